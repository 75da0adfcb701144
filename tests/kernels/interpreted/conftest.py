"""Kernels in Triton's interpreter: it is chosen when Triton is imported, so these tests run in a process of their own.

``tests/kernels/test_interpreted.py`` starts one for each file here; by hand: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.kernels.interpreted.bfloat16 import install

    install()
else:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True, scope="session")
def poisoned():
    """New memory holds NaN (integers: their largest value), and PyTorch refuses what is not deterministic."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
