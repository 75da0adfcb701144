"""REFRACTOR: a training stack for mixture-of-experts language models.

``load_model(path)`` reads a checkpoint; everything else is behind the ``refractor`` command and in the rooms below this one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refractor_core.checkpoint.model import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> object:
    if name == "load_model":  # imported when asked for: it needs torch, and the package itself should not
        from refractor_core.checkpoint.model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
