"""Data parallelism with plain parameters: contiguous main gradients in float32 at least, reduced in buckets behind the backward pass.

Each parameter's ``main_grad`` is a view into one buffer per bucket. A micro batch's gradient is added to it the moment autograd
has it, and the bucket's all-reduce starts once its last parameter has its last gradient, while the backward pass goes on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refractor_core.parallel.collectives import sum_over
from refractor_core.parallel.mesh import Axis, Mesh

_BUCKET_BYTES = 32 << 20


@dataclass
class _Bucket:
    buffer: Tensor
    parameters: list[nn.Parameter]
    pending: int = 0
    launched: bool = False
    work: dist.Work | None = None


class GradientBuffers:
    """Owns the main gradients of some parameters and sums them over an axis.

    Args:
        parameters: in model order; buckets are filled from the last one, whose gradient comes first.
        axis: the ranks that share the parameters' gradients.
        ends: the ranks that hold tied embeddings besides; see ``ShardSpec.ends``.

    Losses are divided by *global* counts, so the reduction is a plain sum and does not depend on how the batch is split.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], axis: Axis, ends: Axis | None = None):
        self.axis = axis
        self.ends = ends or Axis("ends")
        self._buckets: list[_Bucket] = []
        self._fresh: set[nn.Parameter] = set()
        self._last: set[nn.Parameter] = set()
        self._fill_buckets([p for p in parameters if p.requires_grad][::-1])

    def _fill_buckets(self, parameters: list[nn.Parameter]) -> None:
        group: list[nn.Parameter] = []
        size = 0
        for i, p in enumerate(parameters):
            width = main_dtype(p.dtype).itemsize
            group.append(p)
            size += p.numel() * width
            following = parameters[i + 1] if i + 1 < len(parameters) else None
            if following is None or size >= _BUCKET_BYTES or main_dtype(following.dtype) != main_dtype(p.dtype):
                self._buckets.append(self._bucket(group))
                group, size = [], 0

    def _bucket(self, parameters: list[nn.Parameter]) -> _Bucket:
        first = parameters[0]
        buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=main_dtype(first.dtype), device=first.device)
        bucket = _Bucket(buffer, parameters)
        for p, view in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
            p.main_grad = view.view(p.shape)
            p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._accumulate(p, bucket))
        return bucket

    def _accumulate(self, p: nn.Parameter, bucket: _Bucket) -> None:
        if p.grad is None:  # deferred: autograd went past without it, and comes again with it
            return
        if p in self._fresh:
            p.main_grad.copy_(p.grad)
            self._fresh.discard(p)
        else:
            p.main_grad.add_(p.grad)
        p.grad = None
        if p in self._last:
            self._last.discard(p)
            bucket.pending -= 1
            self._launch(lambda waiting: waiting.pending == 0)

    def _launch(self, is_ready: Callable[[_Bucket], bool]) -> None:
        """Starts reductions in bucket order and no other, so that ranks can never pair different buckets."""
        for bucket in self._buckets:
            if bucket.launched:
                continue
            if not is_ready(bucket):
                return
            bucket.launched = True
            if self.axis.size > 1:
                bucket.work = dist.all_reduce(bucket.buffer, group=self.axis.group, async_op=True)

    @property
    def device(self) -> torch.device:
        """Where the buffers are, and so the parameters."""
        return self._buckets[0].buffer.device

    def begin(self) -> None:
        """Starts a step: the next gradient of each parameter replaces what is there."""
        self._fresh = {p for bucket in self._buckets for p in bucket.parameters}
        self._last = set()
        for bucket in self._buckets:
            bucket.pending, bucket.launched = len(bucket.parameters), False

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """The next gradient is the step's last: a bucket is reduced once all of its parameters had theirs.

        Args:
            parameters: of which this holds, those of a pipeline stage; others' buffers have the rest. None: all.
        """
        held = {p for bucket in self._buckets for p in bucket.parameters}
        self._last |= held if parameters is None else held.intersection(parameters)

    def finish(self) -> list[Tensor]:
        """Waits for the sums and returns the buffers. Parameters that had no gradient this step have zero."""
        for p in self._fresh:
            p.main_grad.zero_()
        self._fresh, self._last = set(), set()
        self._launch(lambda waiting: True)  # those with a parameter that took no part in the last backward pass
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        for bucket in self._buckets:
            for p in bucket.parameters:
                if self.ends.size > 1 and p.spec.ends:
                    dist.all_reduce(p.main_grad, group=self.ends.group)
        return [bucket.buffer for bucket in self._buckets]


def gradient_buffers(model: nn.Module, mesh: Mesh) -> list[GradientBuffers]:
    """Main gradients of a model split over a mesh: one ``GradientBuffers`` for each axis that ``ShardSpec.reduced_over`` names."""
    by_axis: dict[str, list[nn.Parameter]] = {}
    for p in model.parameters():
        by_axis.setdefault(p.spec.reduced_over, []).append(p)
    return [GradientBuffers(parameters, mesh.axis(name), mesh.axis("ends")) for name, parameters in by_axis.items()]


@torch.no_grad()
def gradient_norm(model: nn.Module, mesh: Mesh) -> Tensor:
    """√Σ g² over the whole model's main gradients, float64 scalar, the same on every rank; collective.

    A piece that several ranks of the stage hold counts once: each adds its share of the squares; so do both ends of a pipeline for an
    embedding that both hold. Experts' copies are counted like any other, so the norm does not depend on the layout.
    """
    copies, ends = mesh.axis("dense").size, mesh.axis("ends").size
    shares = {p: p.spec.pieces / (copies * (ends if p.spec.ends else 1)) for p in model.parameters() if p.requires_grad}
    squares = [p.main_grad.double().square().sum() * share for p, share in shares.items()]
    return sum_over(torch.stack(squares).sum(), mesh.axis("world")).sqrt()


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Format of main gradients and master weights for parameters of this format: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
