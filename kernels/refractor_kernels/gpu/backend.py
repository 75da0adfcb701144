"""Where Triton's kernels can run at all. Imports without Triton."""

import os

import torch
from torch import Tensor

from refractor_kernels.gpu import tables

HOW_TO_GET = "triton is not installed; get it with: pip install triton==3.6.0 'numpy<2.4'"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read once, at import, as Triton does."""


def _hindrance() -> str | None:
    if not INTERPRETED and not torch.version.cuda:
        return "this PyTorch is built without CUDA"
    try:
        import triton  # noqa: F401
    except ImportError:
        return HOW_TO_GET
    return None


HINDRANCE = _hindrance()
"""Why no kernel can run in this process, or None."""


def unsupported(device: torch.device) -> str | None:
    """Why there are no tables for this device, or None."""
    if INTERPRETED:
        return None
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    if properties.major == 9:
        return None
    return f"compute capability is {properties.major}.{properties.minor}, and the tuning tables are for 9.0"


def refusal(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], table: str, **sizes: int) -> str | None:
    """Why no shipped configuration of ``table`` runs on ``x``, or None.

    Args:
        name: what the caller calls ``x``.
        sizes: those that the table's buckets are keyed by.
    """
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"{name} is on {x.device.type}"
    if (told := unsupported(x.device)) is not None:
        return told
    if x.dtype not in dtypes:
        return f"{name} is {x.dtype}"
    return tables.misfit(table, **sizes)


def for_tma(x: Tensor) -> Tensor:
    """Contiguous and at an address that 16 divides: itself, or a copy where it is a view that is neither. Inside of ops only, since a
    compiler of graphs knows no addresses."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def programs(device: torch.device, per_sm: int) -> int:
    """How many programs of a persistent kernel run at once. In the interpreter few, so that each walks over several tiles."""
    return 3 if INTERPRETED else per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def adding_programs(bucket: tables.Bucket) -> int:
    """As ``programs``, where each program makes one of the terms of a sum, so that their number must not depend on the device."""
    return 3 if INTERPRETED else bucket.grid["programs"]
