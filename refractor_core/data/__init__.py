"""Documents to batches: sources, filters, deduplication, tokens, order.

``build`` turns documents into a dataset directory, ``Dataset`` opens one, ``BatchPlan`` says what every step of training sees. They are
imported when asked for: a process that builds never imports torch, which would cost it 250 MB.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refractor_core.data.batch import IGNORE, Batch
    from refractor_core.data.builder import build
    from refractor_core.data.dataset import Dataset
    from refractor_core.data.order import BatchPlan

__all__ = ["IGNORE", "Batch", "BatchPlan", "Dataset", "build"]

_MODULES = {"IGNORE": "batch", "Batch": "batch", "BatchPlan": "order", "Dataset": "dataset", "build": "builder"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"refractor_core.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
