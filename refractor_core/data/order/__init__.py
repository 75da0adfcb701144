"""The order in which training sees a dataset: ``batch(step)`` as a pure function, without a sample index.

The documents of each source are packed into sequences once per sequence length (``packing``, ``plan``, ``cache``); stages take packs up
front, by quota and by the length of documents, and leave the rest to those after them (``stages``, ``selection``); a step finds its packs
by arithmetic, in a keyed random order inside each block of packs, and reads their tokens (``batches``).
"""

from refractor_core.data.order.batches import BatchPlan

__all__ = ["BatchPlan"]
