"""Launch parameters of every kernel by architecture and shape bucket, read from ``sm90.json``.

The file maps a kernel's name to its buckets, smallest first:
``{"to": {size: largest value}, "constants": {constexpr: value}, "num_warps", "num_stages", "grid": {…}}``.
The first bucket that holds all sizes of a call is the one launched; a last bucket without bounds takes the rest. ``grid`` holds what the
launch needs beside the kernel, such as a number of programs. The ahead-of-time check compiles every bucket of every kernel.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURE = "sm90"


@dataclass(frozen=True)
class Bucket:
    """One launch configuration and the largest sizes it is for."""

    to: dict[str, int]
    constants: dict[str, int]
    num_warps: int
    num_stages: int
    grid: dict[str, int] = field(default_factory=dict)

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        bounds = " ".join(f"{name}≤{bound}" for name, bound in self.to.items())
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{bounds or 'any'}: {constants} warps={self.num_warps} stages={self.num_stages}"


_BUCKETS = {
    kernel: tuple(Bucket(**entry) for entry in entries)
    for kernel, entries in json.loads((Path(__file__).parent / f"{ARCHITECTURE}.json").read_text()).items()
}


def buckets(kernel: str) -> tuple[Bucket, ...]:
    """All of a kernel's buckets, in the order they are tried."""
    return _BUCKETS[kernel]


def _find(kernel: str, sizes: dict[str, int]) -> Bucket | None:
    for bucket in _BUCKETS[kernel]:
        if all(sizes[name] <= bound for name, bound in bucket.to.items()):
            return bucket
    return None


def choose(kernel: str, **sizes: int) -> Bucket:
    """The bucket to launch; the caller has asked ``misfit`` before."""
    bucket = _find(kernel, sizes)
    assert bucket is not None, (kernel, sizes)
    return bucket


def misfit(kernel: str, **sizes: int) -> str | None:
    """Why no bucket holds these sizes, or None."""
    if _find(kernel, sizes) is not None:
        return None
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    largest = ", ".join(f"{name} {bound}" for name, bound in buckets(kernel)[-1].to.items())
    return f"{asked}, and the tuning table of {kernel} ends at {largest}"
