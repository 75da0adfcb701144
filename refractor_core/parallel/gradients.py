"""Data parallelism with plain parameters: contiguous main gradients in float32 at least, reduced in buckets behind the backward pass.

A bucket holds some parameters and their main gradients in two flat buffers. ``main_grad`` of each parameter is a view into the second; a
micro batch's gradient is added to it the moment autograd has it. Once the last parameter of a bucket has its last gradient, and while the
backward pass goes on, the bucket is summed over the ranks that share it: a reduce-scatter leaves each rank of the shard axis its slice of
the sum, and an all-reduce of that slice adds the other copies of the sharded group. After the update the slices of the parameters are
gathered where they lie. Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 5 (ZeRO-1).
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refractor_core.parallel.collectives import own_slice, start_gather_in_place, start_scattered_sum_in_place, start_sum_in_place
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.segments import Segment
from refractor_core.parallel.sharding import main_dtype

_BUCKET_BYTES = 32 << 20
_ALIGNMENT = 64
"""Elements that a parameter's place in a bucket is a multiple of: kernels want addresses that are multiples of 16 bytes and more."""


@dataclass
class _Bucket:
    """Parameters of one format that the same ranks share.

    Args:
        places: parameter → name and first element in the buffers. Between parameters and after the last one is padding.
        weights, gradients: flat, equally long, a multiple of the shard axis.
        shard: the ranks that own a slice each; ``copies``: those that own the same slice in other groups; ``ends``: those that hold the
            same parameters on another pipeline rank.
    """

    places: dict[nn.Parameter, tuple[str, int]]
    weights: Tensor
    gradients: Tensor
    shard: Axis
    copies: Axis
    ends: Axis
    pending: int = 0
    launched: bool = False
    work: dist.Work | None = field(default=None, repr=False)

    def wait(self) -> None:
        """For the collective under way, if any."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class GradientBuffers:
    """Owns the main gradients of a model's parameters, sums them over the ranks, and knows which stretches this rank owns.

    Takes the parameters' storage over: each becomes a view into its bucket, with the values that it has.

    Args:
        named_parameters: in model order, each with its ``ShardSpec``; buckets are filled from the last one, whose gradient comes first.
            Those without ``requires_grad`` are left alone.
        mesh: the layout.

    Losses are divided by *global* counts, so the reduction is a plain sum and does not depend on how the batch is split.

    Raises:
        ValueError: two parameters share a name, or none requires a gradient.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], mesh: Mesh):
        self._mesh = mesh
        self._hook = _weakly(self._accumulate)
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        if not named:
            raise ValueError("no parameter requires a gradient, so there is nothing to optimise; unfreeze some")
        twice = [name for i, (name, _) in enumerate(named) if name in {other for other, _ in named[:i]}]
        if twice:
            raise ValueError(f"two parameters are named {twice[0]}; give each its own name")
        self._buckets = [self._bucket(group) for group in _groups(named[::-1])]
        self._of = {p: bucket for bucket in self._buckets for p in bucket.places}
        self._fresh: set[nn.Parameter] = set()
        self._last: set[nn.Parameter] = set()
        self._scattering: _Bucket | None = None
        segments = {segment.name: segment for bucket in self._buckets for segment in _segments(bucket)}
        self.segments: list[Segment] = [segments[name] for name, _ in named]
        """What this rank owns of each parameter, in model order; some may be empty."""

    def _bucket(self, group: list[tuple[str, nn.Parameter]]) -> _Bucket:
        first = group[0][1]
        shard, copies = (self._mesh.axis(name) for name in first.spec.reduced_over)
        ends = self._mesh.axis("ends") if first.spec.ends else Axis("ends")
        places, size = {}, 0
        for name, p in group:
            places[p] = (name, size)
            size += _aligned(p.numel(), 1)
        size = _aligned(size, shard.size)
        weights, gradients = first.new_zeros(size), first.new_zeros(size, dtype=main_dtype(first.dtype))
        bucket = _Bucket(places, weights.detach(), gradients.detach(), shard, copies, ends)
        with torch.no_grad():
            for p, (_, at) in places.items():
                place = bucket.weights[at : at + p.numel()].view(p.shape)
                place.copy_(p)
                p.data = place
                p.main_grad = bucket.gradients[at : at + p.numel()].view(p.shape)
                p.register_post_accumulate_grad_hook(self._hook)
        return bucket

    @property
    def device(self) -> torch.device:
        """Where the buffers are, and so the parameters."""
        return self._buckets[0].gradients.device

    def begin(self) -> None:
        """Starts a step: the next gradient of each parameter replaces what is there."""
        self._fresh, self._last = set(self._of), set()
        for bucket in self._buckets:
            bucket.pending, bucket.launched = len(bucket.places), False

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """The next gradient is the step's last: a bucket is reduced once all of its parameters had theirs.

        Args:
            parameters: those of a pipeline stage; others are passed over. None: all.
        """
        self._last |= self._of.keys() if parameters is None else self._of.keys() & set(parameters)

    def _accumulate(self, p: nn.Parameter) -> None:
        if p.grad is None:  # deferred: autograd went past without it, and comes again with it
            return
        bucket = self._of[p]
        assert not bucket.launched, f"a gradient of {bucket.places[p][0]} came after the one that was said to be the last"
        if p in self._fresh:
            p.main_grad.copy_(p.grad)
            self._fresh.discard(p)
        else:
            p.main_grad.add_(p.grad)
        p.grad = None
        if p in self._last:
            self._last.discard(p)
            bucket.pending -= 1
            self._launch()

    def _launch(self, everything: bool = False) -> None:
        """Starts reductions in bucket order and no other, over whichever axes, so that ranks can never pair different buckets.

        What both pipeline ends hold comes last: it is not complete before every stage's backward pass is.
        """
        for bucket in self._buckets:
            if bucket.launched:
                continue
            if not everything and (bucket.pending or bucket.ends.size > 1):
                return
            bucket.launched = True
            self._sum_copies()  # of the bucket before: its reduce-scatter had the time of a bucket to end in
            bucket.work = start_sum_in_place(bucket.gradients, bucket.ends)
            bucket.wait()
            bucket.work = start_scattered_sum_in_place(bucket.gradients, bucket.shard)
            self._scattering = bucket
            if bucket.work is None:
                self._sum_copies()

    def _sum_copies(self) -> None:
        bucket, self._scattering = self._scattering, None
        if bucket is not None:
            bucket.wait()
            bucket.work = start_sum_in_place(own_slice(bucket.gradients, bucket.shard), bucket.copies)

    def finish(self) -> list[Segment]:
        """Waits for the sums: the segments' gradients are complete, the rest of ``main_grad`` has no meaning until ``gather_gradients``.

        Parameters that had no gradient this step have zero.
        """
        for p in self._fresh:
            p.main_grad.zero_()
        self._fresh, self._last = set(), set()
        self._launch(everything=True)  # those with a parameter that took no part in the last backward pass
        self._sum_copies()
        for bucket in self._buckets:
            bucket.wait()
        return self.segments

    def gather_gradients(self) -> None:
        """Completes every ``main_grad`` from the segments' gradients, after ``finish``; collective. Nothing in a step needs it."""
        self._gather(bucket.gradients for bucket in self._buckets)

    def gather_weights(self) -> None:
        """Completes every parameter from the segments' weights; collective."""
        self._gather(bucket.weights for bucket in self._buckets)

    def _gather(self, buffers: Iterator[Tensor]) -> None:
        for bucket, buffer in zip(self._buckets, buffers, strict=True):
            bucket.work = start_gather_in_place(buffer, bucket.shard)
        for bucket in self._buckets:
            bucket.wait()


def _weakly(accumulate: Callable[[nn.Parameter], None]) -> Callable[[nn.Parameter], None]:
    """Calls a method for as long as its object lives.

    Tensors hold their hooks where Python's collector does not look: a hook that held the buffers, which hold the tensors, would keep both,
    and the process groups of the mesh, until the process ends.
    """
    method = weakref.WeakMethod(accumulate)

    def hook(p: nn.Parameter) -> None:
        if (accumulate := method()) is not None:
            accumulate(p)

    return hook


def _groups(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Cuts parameters into buckets of those that the same ranks share, in the order in which the buckets fill; those of the ends last."""
    closed, open_groups = [], {}
    for name, p in named:
        key = (p.spec.ends, p.spec.reduced_over, p.dtype, p.device)
        group = open_groups.setdefault(key, [])
        group.append((name, p))
        if sum(p.numel() for _, p in group) * main_dtype(p.dtype).itemsize >= _BUCKET_BYTES:
            closed.append(open_groups.pop(key))
    return sorted([*closed, *open_groups.values()], key=lambda group: group[0][1].spec.ends)


def _segments(bucket: _Bucket) -> Iterator[Segment]:
    """The part of each parameter that lies in this rank's slice."""
    size = bucket.gradients.numel() // bucket.shard.size
    low, high = bucket.shard.rank * size, (bucket.shard.rank + 1) * size
    for p, (name, at) in bucket.places.items():
        first, last = (min(max(edge - at, 0), p.numel()) for edge in (low, high))
        gradient, weight = (buffer[at + first : at + last] for buffer in (bucket.gradients, bucket.weights))
        yield Segment(name, p, first, last, gradient, weight, bucket.shard)


def _aligned(size: int, ranks: int) -> int:
    unit = _ALIGNMENT * ranks
    return math.ceil(size / unit) * unit
