"""Collectives that autograd knows: what each does to values forward and to gradients backward.

Three kinds of tensors live on the ranks of an axis. *Replicated*: the same on every rank, a value that counts once; so is its gradient.
*Partial*: the ranks hold terms of a sum. *Split*: each rank holds its slice along a dimension. Every function here goes from one kind to
another, and its backward is the adjoint of that map under those inner products:

    copy_to         replicated → one use per rank   identity         backward: sum of the uses' gradients
    reduce_from     partial    → replicated         sum              backward: identity
    scatter         replicated → split              own slice        backward: all-gather
    join            split      → replicated         all-gather       backward: own slice
    gather          split      → one use per rank   all-gather       backward: reduce-scatter
    reduce_scatter  partial    → split              reduce-scatter   backward: all-gather
    all_to_all      rows       → rows               all-to-all       backward: all-to-all the other way

On an axis of size 1 each returns its argument and touches no process group. Sums are in float32 at least, whatever the tensor's format.
Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from refractor_core.parallel.mesh import Axis

# torch 2.13 renamed these two; torch 2.11 has the old names only.
_all_gather_single: Callable = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Uses a replicated tensor differently on each rank: identity; backward sums the gradients."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Sums partial tensors into a replicated one; backward is the identity."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice of a replicated tensor; backward gathers the slices' gradients.

    Raises:
        ValueError: the dimension does not divide over the axis.
    """
    return x if axis.size == 1 else _Scatter.apply(x, axis, dim)


def join(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All slices as a replicated tensor; backward takes this rank's slice of the (replicated) gradient."""
    return x if axis.size == 1 else _Join.apply(x, axis, dim)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All slices, to be used differently on each rank; backward sums the uses' gradients and takes this rank's slice."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice of the sum of partial tensors; backward gathers.

    Raises:
        ValueError: the dimension does not divide over the axis.
    """
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim)


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Sends consecutive rows (dimension 0) to the ranks of the axis in order; returns the received rows, senders in order.

    Args:
        send, receive: rows per rank; zeros are fine.
    """
    return x if axis.size == 1 else Exchange(axis, send, receive).wait_for(x)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, without gradient, in the dtype of x."""
    return x if axis.size == 1 else _all_reduced(x.detach(), axis)


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """The elementwise maximum over the axis, without gradient."""
    if axis.size == 1:
        return x
    out = x.detach().clone()
    dist.all_reduce(out, dist.ReduceOp.MAX, group=axis.group)
    return out


def start_sum(x: Tensor, axis: Axis, dim: int | None) -> Callable[[], Tensor]:
    """Launches a sum over an axis of more than one rank, without gradient; calling what it returns waits for the result.

    Args:
        dim: the result is this rank's slice of the sum along this dimension; None: the whole sum.
    """
    if dim is None:
        out = x.to(_wide(x), copy=True, memory_format=torch.contiguous_format)
        work = dist.all_reduce(out, group=axis.group, async_op=True)
    else:
        pieces = torch.stack(_slices(x, axis, dim)).to(_wide(x))
        out = torch.empty_like(pieces[0])
        work = _reduce_scatter_single(out.view(-1), pieces.view(-1), group=axis.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return out.to(x.dtype)

    return finish


def start_sum_in_place(x: Tensor, axis: Axis) -> dist.Work | None:
    """Launches the sum over the axis into ``x``, contiguous, in its own format; None on an axis of size 1."""
    return None if axis.size == 1 else dist.all_reduce(x, group=axis.group, async_op=True)


def start_scattered_sum_in_place(flat: Tensor, axis: Axis) -> dist.Work | None:
    """Launches the sum over the axis into this rank's slice of a flat tensor; the others lose their meaning. None on an axis of size 1."""
    return None if axis.size == 1 else _reduce_scatter_single(own_slice(flat, axis), flat, group=axis.group, async_op=True)


def start_gather_in_place(flat: Tensor, axis: Axis) -> dist.Work | None:
    """Launches the gathering of every rank's own slice of a flat tensor into all of it; None on an axis of size 1."""
    return None if axis.size == 1 else _all_gather_single(flat, own_slice(flat, axis), group=axis.group, async_op=True)


def own_slice(flat: Tensor, axis: Axis) -> Tensor:
    """This rank's slice of a flat tensor, as a view. The axis divides its length."""
    return flat.view(axis.size, -1)[axis.rank]


def gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All slices along a dimension, without gradient."""
    return x if axis.size == 1 else _all_gathered(x.detach(), axis, dim)


class Exchange:
    """An all-to-all of rows in two halves, so that other work goes on between them; backward likewise, in the opposite order.

    ``start`` launches it forward and waits for the gradients' exchange backward; ``wait`` waits forward and launches backward. Between the
    two, what ``start`` returned must not be touched.

    Args:
        axis: of more than one rank.
        send, receive: rows per rank; zeros are fine.
    """

    def __init__(self, axis: Axis, send: Sequence[int], receive: Sequence[int]):
        self.axis, self.send, self.receive = axis, list(send), list(receive)
        self._pending: dist.Work | None = None
        self._gradient: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """Launches the exchange of the rows of ``x``; returns the buffer that they will arrive in."""
        return _Start.apply(x, self)

    def wait(self, arriving: Tensor) -> Tensor:
        """The received rows."""
        return _Wait.apply(arriving, self)

    def wait_for(self, x: Tensor) -> Tensor:
        """Both halves at once."""
        return self.wait(self.start(x))

    def _launch(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        assert self._pending is None, "an exchange carries one transfer at a time"
        out = x.new_empty(sum(receive), *x.shape[1:])
        self._pending = dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.axis.group, async_op=True)
        return out

    def launch(self, x: Tensor) -> Tensor:
        """Starts the transfer forward, without autograd."""
        return self._launch(x, self.send, self.receive)

    def launch_gradient(self, grad: Tensor) -> None:
        """Starts the transfer backward."""
        self._gradient = self._launch(grad, self.receive, self.send)

    def finish(self) -> None:
        """Waits for the transfer under way."""
        self._pending.wait()
        self._pending = None

    def finish_gradient(self) -> Tensor:
        """Waits for the transfer backward and returns what it brought."""
        self.finish()
        grad, self._gradient = self._gradient, None
        return grad


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.exchange.finish_gradient(), None


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.finish()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.exchange.launch_gradient(grad)
        return grad, None  # only tells autograd to go on: its rows are under way, and start's backward hands over those that come


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _all_reduced(grad, ctx.axis), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _own_slice(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _all_gathered(grad, ctx.axis, ctx.dim), None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _all_gathered(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _own_slice(grad, ctx.axis, ctx.dim), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _all_gathered(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _reduce_scattered(grad, ctx.axis, ctx.dim), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _reduce_scattered(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _all_gathered(grad, ctx.axis, ctx.dim), None, None


def _wide(x: Tensor) -> torch.dtype:
    """The format that sums over ranks are taken in."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _all_reduced(x: Tensor, axis: Axis) -> Tensor:
    return start_sum(x, axis, None)()


def _all_gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    out = x.new_empty(axis.size, *x.shape)
    _all_gather_single(out.view(-1), x.contiguous().view(-1), group=axis.group)
    return out.flatten(0, 1) if dim == 0 else torch.cat(out.unbind(0), dim)


def _reduce_scattered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return start_sum(x, axis, dim)()


def _own_slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return _slices(x, axis, dim)[axis.rank].contiguous()


def _slices(x: Tensor, axis: Axis, dim: int) -> tuple[Tensor, ...]:
    if x.shape[dim] % axis.size:
        raise ValueError(f"dimension {dim} of shape {tuple(x.shape)} does not divide over {axis.name}={axis.size}")
    return x.chunk(axis.size, dim) if x.shape[dim] else (x,) * axis.size
