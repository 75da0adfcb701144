"""What the ahead-of-time check needs to know of a kernel beside its tuning table: argument types and the constants of its modes."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Variant:
    """One specialisation, as a launch would make it.

    Args:
        types: by argument: ``*bf16`` a pointer (aligned to 16 bytes), ``i32`` a size, ``i32:16`` a size that 16 divides, ``fp32``,
            ``tensordesc<bf16[128,64]>``, where names in braces are the bucket's constants.
        constants: the kernel's modes. The name of a bucket's size or constant stands for its value.
    """

    label: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)


def both(*variants: Variant) -> tuple[Variant, ...]:
    """Each in bf16, as given, and in fp16."""
    found = []
    for variant in variants:
        types = {name: kind.replace("bf16", "fp16") for name, kind in variant.types.items()}
        found += [variant, Variant(variant.label.replace("bf16", "fp16"), types, variant.constants)]
    return tuple(found)


@dataclass(frozen=True)
class Shipped:
    """A kernel, the name of its table, and its specialisations.

    Args:
        variants: by dtype and mode.
        work: ``multiplies`` matrices, and must use the tensor cores, fed asynchronously; ``moves`` tensors, and must move 16 bytes at a
            time; ``indexes``, on which neither is asked.
        wide_share: least part of the bytes moved by loads, and of those by stores, that must go 16 at a time, as the code stands. What is
            left is for one number per row; a kernel of four streams of which one is narrow has 0.75.
    """

    table: str
    kernel: Any
    variants: tuple[Variant, ...]
    work: Literal["moves", "multiplies", "indexes"] = "moves"
    wide_share: float = 0.8
