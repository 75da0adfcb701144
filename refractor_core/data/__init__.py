"""Documents to batches: sources, filters, deduplication, tokens, order.

``build`` turns documents into a dataset directory, ``Dataset`` opens one, ``BatchPlan`` says what every step of training sees.
"""

from refractor_core.data.batch import IGNORE, Batch
from refractor_core.data.builder import build
from refractor_core.data.dataset import Dataset
from refractor_core.data.order import BatchPlan

__all__ = ["IGNORE", "Batch", "BatchPlan", "Dataset", "build"]
