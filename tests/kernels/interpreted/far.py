"""Addresses beyond 2³¹ elements without the memory: the launch pretends to be far along its grid, over buffers that begin as far before.

An offset that overflows 32 bits then reads or writes 2³² elements away from the buffer, which ends the process.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


@dataclass
class Before:
    """A pointer that lies ``elements`` before the tensor's data."""

    tensor: torch.Tensor
    elements: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def data_ptr(self) -> int:
        # Where the heap lies low, that is below 0; addresses are uint64, and adding the offset brings it back.
        return (self.tensor.data_ptr() - self.elements * self.tensor.element_size()) % 2**64


@contextmanager
def along_the_grid(programs: int, second: int = 0):
    """Every program's number on the first axis is larger by so many, and on the second by ``second``."""
    number = interpreter.InterpreterBuilder.create_get_program_id

    def moved(self, axis):
        found = number(self, axis)
        return interpreter.TensorHandle(found.data + np.int32(programs if axis == 0 else second), found.dtype)

    executor = interpreter.GridExecutor
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_get_program_id", moved),
        mock.patch.object(executor, "_init_args_hst", lambda self, arguments, options: (arguments, options)),  # nothing is on a device
        mock.patch.object(executor, "_restore_args_dev", lambda self, *_: None),
    ):
        yield
