"""What the ahead-of-time check needs to know of a kernel beside its tuning table: argument types and the constants of its modes."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Narrow:
    """Why some of the loads and stores through a pointer are narrower than 16 bytes.

    Args:
        wide_share: least part of the pointer's bytes, as the code stands, that moves 16 at a time all the same.
        below: only of buckets with these constants, where they are smaller.
    """

    why: str
    wide_share: float = 0.0
    below: dict[str, int] = field(default_factory=dict)

    def holds(self, constants: dict[str, int], wide_share: float) -> bool:
        return wide_share >= self.wide_share and all(constants[name] < bound for name, bound in self.below.items())


A_ROW = Narrow("one number a row of the tile")
AN_EXPERT = Narrow("one number an expert")


@dataclass(frozen=True)
class Variant:
    """One specialisation, as a launch would make it.

    Args:
        types: by argument: ``*bf16`` a pointer (aligned to 16 bytes), ``i32`` a size, ``i32:16`` a size that 16 divides, ``fp32``,
            ``tensordesc<bf16[128,64]>``, where names in braces are the bucket's constants.
        constants: the kernel's modes. The name of a bucket's size or constant stands for its value.
        narrow: the pointers that are excepted from moving 16 bytes at a time. Memory whose address is itself loaded goes by the pointer
            that the address was loaded from, with a star before it.
    """

    label: str
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    narrow: dict[str, Narrow] = field(default_factory=dict)


def both(*variants: Variant) -> tuple[Variant, ...]:
    """Each in bf16, as given, and in fp16."""
    found = []
    for variant in variants:
        types = {name: kind.replace("bf16", "fp16") for name, kind in variant.types.items()}
        found += [variant, Variant(variant.label.replace("bf16", "fp16"), types, variant.constants, variant.narrow)]
    return tuple(found)


@dataclass(frozen=True)
class Shipped:
    """A kernel, the name of its table, and its specialisations.

    Args:
        variants: by dtype and mode.
        multiplies: matrices, and must use the tensor cores, fed asynchronously. All kernels must move 16 bytes at a time, but for the
            exceptions of their variants.
    """

    table: str
    kernel: Any
    variants: tuple[Variant, ...]
    multiplies: bool = False
