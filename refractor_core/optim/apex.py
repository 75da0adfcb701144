"""NVIDIA apex, if it is here: found by what it can do, because a web toolkit of 2013 has its name on PyPI."""

import importlib
from typing import Any


def fused_adam() -> type[Any] | None:
    """NVIDIA's ``FusedAdam``, or None."""
    return getattr(_optimizers(), "FusedAdam", None) if is_nvidias() else None


def is_nvidias() -> bool:
    """Whether there is an ``apex`` with fused optimizers and the CUDA extension that they call, which others of that name lack."""
    return hasattr(_optimizers(), "FusedAdam") and _imported("amp_C") is not None


def _optimizers() -> Any:
    return _imported("apex.optimizers")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # the toolkit raises errors of its own under today's Python, and apex without its libraries those of the loader
        return None
