"""A parameter knows its global shape: the one source for initialisation, norms, gradient comparison and checkpoints.

``ShardSpec`` says which axes split which dimensions of a tensor and in which order, and which fused sub-blocks (gate and up, or
queries, keys and values) a split must cut one by one. Every rank can then name the global index of each element it holds.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from refractor_core.parallel.mesh import Axis

_CHUNK = 1 << 20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class ShardSpec:
    """Where a rank's piece of a tensor lies in the whole.

    Args:
        global_shape: shape of the whole tensor.
        splits: dimension → axes that split it, outermost first. Axes of size 1 may be named.
        blocks: dimension → sizes of the fused sub-blocks along it, each split by itself; they add up to the dimension.
        expert: the tensor lives on the expert grid.
        partial: tensor ranks that hold the same piece use it on different tokens or heads, so that their gradients are terms of a sum.
        ends: first and last pipeline rank hold the tensor under one name, so that their gradients are terms of a sum too.

    Raises:
        ValueError: a dimension or block does not divide over its axes, or blocks do not add up.
    """

    global_shape: tuple[int, ...]
    splits: Mapping[int, tuple[Axis, ...]]
    blocks: Mapping[int, tuple[int, ...]]
    expert: bool = False
    partial: bool = False
    ends: bool = False

    @property
    def reduced_over(self) -> tuple[str, str]:
        """Names of the two mesh axes over which the tensor's gradient is summed, the one rule for every parameter: the ranks that divide
        its sum and its optimizer state among them, and the copies of these.

        Experts see the tokens of all ranks of their block, so the other blocks are missing: together ``expert_data``. A dense tensor sees
        the tokens of its own data and context rank: ``data_context``; if its tensor ranks' gradients are partial, these too: ``dense``.
        """
        if self.expert:
            return "expert_shard", "expert_replicate"
        return ("shard_dense" if self.partial else "shard_context"), "data_replicate"

    def __post_init__(self) -> None:
        for dim, sizes in self.blocks.items():
            if sum(sizes) != self.global_shape[dim]:
                raise ValueError(f"blocks {sizes} of dimension {dim} do not add up to {self.global_shape[dim]}")
        for dim, axes in self.splits.items():
            for size in self.blocks.get(dim, (self.global_shape[dim],)):
                if size % self._degree(dim):
                    names = " × ".join(f"{axis.name}={axis.size}" for axis in axes)
                    where = f"dimension {dim} of shape {self.global_shape}"
                    raise ValueError(f"{where} has a block of {size}, which does not divide over {names}")

    def _degree(self, dim: int) -> int:
        return math.prod(axis.size for axis in self.splits.get(dim, ()))

    def _position(self, dim: int) -> int:
        position = 0
        for axis in self.splits.get(dim, ()):
            position = position * axis.size + axis.rank
        return position

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's piece."""
        return tuple(size // self._degree(dim) for dim, size in enumerate(self.global_shape))

    @property
    def pieces(self) -> int:
        """Pieces that the tensor is cut into."""
        return math.prod(self._degree(dim) for dim in self.splits)

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds the whole tensor."""
        return self.local_shape == self.global_shape

    def ranges(self, dim: int) -> list[tuple[int, int]]:
        """Global ranges [first, last) along ``dim`` that this rank holds, in local order: one per fused sub-block."""
        degree, position, start, found = self._degree(dim), self._position(dim), 0, []
        for size in self.blocks.get(dim, (self.global_shape[dim],)):
            piece = size // degree
            found.append((start + position * piece, start + (position + 1) * piece))
            start += size
        return found

    def take(self, whole: Tensor) -> Tensor:
        """This rank's piece of the whole tensor, as a contiguous copy."""
        for dim in range(whole.dim()):
            if self._degree(dim) > 1:
                whole = torch.cat([whole.narrow(dim, first, last - first) for first, last in self.ranges(dim)], dim)
        return whole.contiguous()

    def global_indices(self, first: int, last: int) -> np.ndarray:
        """Global flat indices (int64) of the local flat elements [first, last)."""
        local = np.arange(first, last, dtype=np.int64)
        if self.is_whole:
            return local
        index, stride = np.zeros_like(local), 1
        for dim in reversed(range(len(self.global_shape))):
            local, within = np.divmod(local, self.local_shape[dim])
            coordinates = np.concatenate([np.arange(low, high, dtype=np.int64) for low, high in self.ranges(dim)])
            index += coordinates[within] * stride
            stride *= self.global_shape[dim]
        return index


def parameter(
    global_shape: tuple[int, ...],
    *,
    std: float | None = None,
    fill: float | None = None,
    splits: Mapping[int, tuple[Axis, ...]] | None = None,
    blocks: Mapping[int, tuple[int, ...]] | None = None,
    expert: bool = False,
    partial: bool = False,
    ends: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Parameter:
    """This rank's piece of a parameter, uninitialised; ``initialise`` fills it.

    Args:
        std: standard deviation of a normal initialisation, or
        fill: the constant to start from. Exactly one of the two.
        splits, blocks, expert, partial, ends: see ``ShardSpec``.
    """
    if (std is None) == (fill is None):
        raise ValueError("give exactly one of std and fill")
    spec = ShardSpec(tuple(global_shape), dict(splits or {}), dict(blocks or {}), expert, partial, ends)
    made = nn.Parameter(torch.empty(spec.local_shape, dtype=dtype, device=device))
    made.spec, made.init_std, made.init_fill = spec, std, fill
    return made


def _mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): uint64 → uint64, bijective, passes BigCrush as a counter-based generator."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Format of main gradients and master weights for parameters of this format: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def fill_initial(target: Tensor, name: str, p: nn.Parameter, seed: int, indices: Callable[[int, int], np.ndarray]) -> None:
    """Fills a contiguous tensor with initial values of a parameter: each a function of (seed, name, global index) alone.

    Memory beyond the target is a few chunks of 2^20 elements.

    Args:
        target: of any stretch of the parameter, in any format.
        name, p: the parameter, made by ``parameter``.
        indices: global flat indices (int64) of elements [first, last) of the target.
    """
    if p.init_std is None:
        target.fill_(p.init_fill)
        return
    key = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little"))
    flat = target.view(-1)
    for first in range(0, flat.numel(), _CHUNK):
        last = min(first + _CHUNK, flat.numel())
        bits = _mix(key + (indices(first, last).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        normal = torch.erfinv(torch.from_numpy(2.0 * uniform - 1.0)) * math.sqrt(2.0)
        # Low precision is rounded from the master weight's format, so that a parameter always is its rounded master.
        flat[first:last] = (normal * p.init_std).to(main_dtype(target.dtype))


def initialise(module: nn.Module, seed: int) -> None:
    """Fills every parameter made by ``parameter``: a value depends on (seed, name, global index), never on the layout.

    The whole tensor is never built.
    """
    for name, p in module.named_parameters():
        fill_initial(p.detach(), name, p, seed, p.spec.global_indices)
