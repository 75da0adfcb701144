"""Adafactor (arXiv 1804.04235) on segments, with statistics of whole parameters: rows, columns and root mean squares are summed over all
ranks that hold a part of a parameter, so that the updates do not depend on the layout.

Formulas are those of ``torch.optim.Adafactor``: step t weighs t^beta2_decay in the second moment, the rate is at most 1/√t and relative to
the parameter's RMS (at least ε₂), and an update whose RMS exceeds ``update_clip`` is scaled down to it. Dimensions before the last two are
batches of matrices: each expert has rows and columns of its own, while the RMS is of all experts.

Legend: E batch (experts), R rows, C columns of this rank's piece of a parameter.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refractor_core.config.training import OptimizerConfig
from refractor_core.parallel.collectives import sum_over
from refractor_core.parallel.extent import Extent
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.norm import squared_norm
from refractor_core.parallel.segments import Saved, Segment

ADAFACTOR_EPSILONS = (1e-15, 1e-3)
"""PyTorch squares the first before it bounds the second moment, so this is the paper's ε₁ = 1e-30. PyTorch's own default in float32,
1.2e-7, also bounds the mean square of a whole matrix from below; clipped gradients of large models lie under it and would be scaled
wrongly. The second is the paper's ε₂."""


class Adafactor:
    """The rule on this rank's segments; a step is collective over the axes that a parameter is divided by.

    Communication per step, all parameters together: one all-reduce of all rows, columns and sums of squares over the shard axis and one
    over each axis that splits them; one of the rows' means where rows are split; one of a number per parameter over each axis.

    Args:
        segments: what this rank owns; the same parameters on all ranks that share them, whether or not a segment is empty.
        masters: their weights, flat, in the same order.
    """

    def __init__(self, segments: Sequence[Segment], masters: Sequence[Tensor], config: OptimizerConfig):
        self._config = config
        self._vectors, self._matrices = [], []
        for segment, master in zip(segments, masters, strict=True):
            kind, found = (_Matrices, self._matrices) if segment.parameter.dim() >= 2 else (_Vector, self._vectors)
            found.append(kind(segment, master))

    def step(self, learning_rate: float, count: int) -> None:
        """Writes each update over its gradient, then takes it."""
        forget, config = count**self._config.beta2_decay, self._config
        parts = [*self._vectors, *self._matrices]
        for part in self._matrices:
            part.measure()
        sizes = [squared_norm(part.master) for part in parts]
        _sum([*(found for part in self._matrices for found in part.sums()), *zip(sizes, (part.all_axes for part in parts), strict=True)])
        means = [part.learn(forget) for part in self._matrices]
        _sum(zip(means, (part.row_axes for part in self._matrices), strict=True))
        for vector in self._vectors:
            vector.update(forget)
        for part, mean in zip(self._matrices, means, strict=True):
            part.update(mean)
        updates = [squared_norm(part.segment.gradient) for part in parts]
        _sum(zip(updates, (part.all_axes for part in parts), strict=True))
        rate = min(learning_rate, count**-0.5)
        for part, size, update in zip(parts, *torch.stack([torch.stack(sizes), torch.stack(updates)]).tolist(), strict=True):
            scale = max(ADAFACTOR_EPSILONS[1], math.sqrt(size / part.count))
            clipped = max(1.0, math.sqrt(update / part.count) / config.update_clip)
            if isinstance(part, _Matrices) and config.weight_decay:
                part.master.mul_(1 - learning_rate * config.weight_decay)
            part.master.add_(part.segment.gradient, alpha=-rate * scale / clipped)

    def state(self) -> list[Saved]:
        """Row and column statistics of this rank's pieces, and vectors' second moments."""
        return [saved for part in [*self._vectors, *self._matrices] for saved in part.state() if saved.tensor.numel()]

    def resume(self, count: int) -> None:
        """Nothing is kept beside the state."""


class _Vector:
    """A parameter of fewer than two dimensions: a second moment for every element."""

    def __init__(self, segment: Segment, master: Tensor):
        spec = segment.parameter.spec
        self.segment, self.master, self.count = segment, master, math.prod(spec.global_shape)
        self.all_axes = (segment.shard, *(axis for axes in spec.splits.values() for axis in axes))
        self.variance = torch.zeros_like(master)

    def update(self, forget: float) -> None:
        gradient = self.segment.gradient
        self.variance.lerp_(gradient.square(), forget)
        gradient.mul_(_root(self.variance.clone()))

    def state(self) -> list[Saved]:
        return [Saved(f"optimizer.{self.segment.name}.variance", self.variance, self.segment.extent)]


class _Matrices:
    """A parameter of two dimensions or more: mean squares of the rows and columns of this rank's piece, all of them on every shard rank."""

    def __init__(self, segment: Segment, master: Tensor):
        spec = segment.parameter.spec
        self.segment, self.master, self.count = segment, master, math.prod(spec.global_shape)
        *_, self.global_rows, self.global_columns = spec.global_shape
        *batch, rows, columns = spec.local_shape
        self.row_var = master.new_zeros(math.prod(batch), rows, 1)
        self.col_var = master.new_zeros(math.prod(batch), 1, columns)
        self.boxes = list(_boxes(segment.first, segment.last, rows, columns))
        last = len(spec.global_shape) - 1
        self.row_axes, self.column_axes = (tuple(spec.splits.get(dim, ())) for dim in (last - 1, last))
        self.all_axes = (segment.shard, *(axis for axes in spec.splits.values() for axis in axes))

    def measure(self) -> None:
        """Sums of squares of this rank's part of each row and column."""
        self._rows, self._columns = torch.zeros_like(self.row_var), torch.zeros_like(self.col_var)
        for box in self.boxes:
            g_ERC = box.of(self.segment.gradient)
            box.rows(self._rows).add_(torch.linalg.vector_norm(g_ERC, dim=-1, keepdim=True).square_())
            box.columns(self._columns).add_(torch.linalg.vector_norm(g_ERC, dim=-2, keepdim=True).square_())

    def sums(self) -> list[tuple[Tensor, tuple[Axis, ...]]]:
        """What is to be summed over which axes before ``learn``."""
        shard = self.segment.shard
        return [(self._rows, (shard, *self.column_axes)), (self._columns, (shard, *self.row_axes))]

    def learn(self, forget: float) -> Tensor:
        """Takes this step's rows and columns in; returns the sum of this rank's rows, [E, 1, 1], to be summed over ``row_axes``."""
        self.row_var.lerp_(self._rows.div_(self.global_columns), forget)
        self.col_var.lerp_(self._columns.div_(self.global_rows), forget)
        del self._rows, self._columns
        return self.row_var.sum(dim=-2, keepdim=True)

    def update(self, row_sum_E11: Tensor) -> None:
        mean_E11 = row_sum_E11.div_(self.global_rows).clamp_(min=ADAFACTOR_EPSILONS[0])
        for box in self.boxes:
            estimate = box.rows(self.row_var) * box.columns(self.col_var)
            estimate.div_(mean_E11[box.batch : box.batch + box.shape[0]])
            box.of(self.segment.gradient).mul_(_root(estimate))

    def state(self) -> list[Saved]:
        whole = Extent.of(self.segment.parameter.spec)
        *batch, rows, columns = zip(whole.global_shape, whole.ranges, strict=True)
        one = (1, ((0, 1),))
        found = []
        for slot, tensor, dims in (("row_var", self.row_var, (*batch, rows, one)), ("col_var", self.col_var, (*batch, one, columns))):
            extent = Extent(tuple(size for size, _ in dims), tuple(ranges for _, ranges in dims), 0, tensor.numel())
            found.append(Saved(f"optimizer.{self.segment.name}.{slot}", tensor, extent))
        return found


@dataclass(frozen=True)
class _Box:
    """A box of elements, [shape] of an [E, R, C] tensor from (batch, row, column), that lie together ``at`` a place in a flat stretch."""

    at: int
    batch: int
    row: int
    column: int
    shape: tuple[int, int, int]

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.at : self.at + math.prod(self.shape)].view(self.shape)

    def rows(self, x_ER1: Tensor) -> Tensor:
        return x_ER1[self.batch : self.batch + self.shape[0], self.row : self.row + self.shape[1]]

    def columns(self, x_E1C: Tensor) -> Tensor:
        return x_E1C[self.batch : self.batch + self.shape[0], :, self.column : self.column + self.shape[2]]


def _boxes(first: int, last: int, rows: int, columns: int) -> Iterator[_Box]:
    """Cuts elements [first, last) of a row-major [E, R, C] tensor into boxes: the rest of a row, whole rows, whole matrices, rows, a row's
    beginning; at most five."""
    at = first
    while at < last:
        (batch, row), column, left = divmod(at // columns, rows), at % columns, last - at
        if column or left < columns:
            shape = (1, 1, min(columns - column, left))
        elif row or left < rows * columns:
            shape = (1, min(rows - row, left // columns), columns)
        else:
            shape = (left // (rows * columns), rows, columns)
        yield _Box(at - first, batch, row, column, shape)
        at += math.prod(shape)


def _root(variance: Tensor) -> Tensor:
    """1/√v in place, v bounded from below by ε₁²."""
    return variance.clamp_(min=ADAFACTOR_EPSILONS[0] ** 2).rsqrt_()


def _sum(sums: Iterable[tuple[Tensor, tuple[Axis, ...]]]) -> None:
    """Sums each tensor in place over its axes, all tensors of an axis in one all-reduce in float64."""
    found = list(sums)
    for axis in dict.fromkeys(axis for _, axes in found for axis in axes if axis.size > 1):
        chosen = [x for x, axes in found if axis in axes]
        together = sum_over(torch.cat([x.reshape(-1).double() for x in chosen]), axis)
        for x, piece in zip(chosen, together.split([x.numel() for x in chosen]), strict=True):
            x.copy_(piece.view_as(x))
