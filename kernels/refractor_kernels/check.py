"""Checks of arguments, each a ``ValueError`` that names the op and the argument. Also what "at least float32" means."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 become float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_values(x: Tensor) -> bool:
    """Whether a tensor has sizes but no numbers: a dry run's, fake or on the meta device."""
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def readable(x: Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device, or breaking a graph that is being compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not without_values(x)


def shapes(op: str, spec: str, **tensors: Tensor) -> dict[str, int]:
    """Matches shapes against a legend such as ``"x:TD w:VD labels:T"`` and returns the sizes by letter.

    Raises:
        ValueError: another number of dimensions, or a letter with two sizes.
    """
    sizes: dict[str, int] = {}
    for part in spec.split():
        name, letters = part.split(":")
        shape = tensors[name].shape
        if len(shape) != len(letters):
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected {len(letters)} dimensions [{', '.join(letters)}]")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{op}: {name} has shape {tuple(shape)}, but {letter} is {sizes[letter]} in [{', '.join(letters)}]")
    return sizes


def same_kind(op: str, **tensors: Tensor) -> None:
    """All of one floating dtype and on one device.

    Raises:
        ValueError: naming the first argument that differs.
    """
    (first, model), *others = tensors.items()
    if model.dtype not in FLOATS:
        raise ValueError(f"{op}: {first} is {model.dtype}, expected float64, float32, bfloat16 or float16")
    for name, tensor in others:
        if tensor.dtype != model.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {model.dtype} like {first}")
        if tensor.device != model.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {model.device} like {first}")


def integer(op: str, dtype: torch.dtype, like: Tensor, **tensors: Tensor) -> None:
    """All of the given integer dtype and on the device of ``like``.

    Raises:
        ValueError: naming the first argument that differs.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}")
