"""Atomic, verified checkpoints: written beside, renamed into place, every tensor and file under a checksum.

A checkpoint is a directory ``step-00000100`` with one safetensors file per rank and ``manifest.json``, written last.
"""

from refractor_core.checkpoint.reader import Checkpoint, Damage, DamagedCheckpoint
from refractor_core.checkpoint.writer import write

__all__ = ["Checkpoint", "Damage", "DamagedCheckpoint", "write"]
