"""Every collective against its mathematical adjoint, ⟨Ax, y⟩ = ⟨x, Aᵀy⟩, and against what it says it does."""

import pytest
import torch
import torch.distributed as dist

from refractor_core.parallel import collectives
from refractor_core.parallel.collectives import (
    Exchange,
    all_to_all,
    copy_to,
    gather,
    join,
    max_over,
    reduce_from,
    reduce_scatter,
    scatter,
    sum_over,
)
from refractor_core.parallel.mesh import Axis
from tests.ranks import run_ranks

N, SHAPE = 3, (2, 6, 5)
SENT = [[0, 4, 1], [2, 0, 0], [0, 3, 0]]  # rows from each rank to each; nothing at all for the third but one row


def _cut(t, rank, dim):
    return t.chunk(N, dim)[rank]


# name → (function, kind of argument, kind of result, result on a rank from all ranks' arguments)
OPS = {
    "copy_to": (copy_to, "replicated", "each", lambda xs, rank: xs[rank]),
    "reduce_from": (reduce_from, "each", "replicated", lambda xs, rank: sum(xs)),
    "scatter": (lambda x, axis: scatter(x, axis, 1), "replicated", "each", lambda xs, rank: _cut(xs[0], rank, 1)),
    "join": (lambda x, axis: join(x, axis, 1), "each", "replicated", lambda xs, rank: torch.cat(xs, 1)),
    "gather": (lambda x, axis: gather(x, axis, 1), "each", "each", lambda xs, rank: torch.cat(xs, 1)),
    "gather_last": (lambda x, axis: gather(x, axis, -1), "each", "each", lambda xs, rank: torch.cat(xs, -1)),
    "gather_first": (lambda x, axis: gather(x, axis, 0), "each", "each", lambda xs, rank: torch.cat(xs, 0)),
    "reduce_scatter": (lambda x, axis: reduce_scatter(x, axis, 1), "each", "each", lambda xs, rank: _cut(sum(xs), rank, 1)),
    # Faults: what the peers' bugs looked like. The adjoint test must tell.
    "undropped": (lambda x, axis: reduce_from(copy_to(x, axis), axis), "each", "replicated", lambda xs, rank: sum(xs)),
    "dropped": (lambda x, axis: _cut(x, axis.rank, 1), "replicated", "each", lambda xs, rank: _cut(xs[0], rank, 1)),
    "unsummed": (lambda x, axis: join(x, axis, 1), "each", "each", lambda xs, rank: torch.cat(xs, 1)),
}
SUMS, LOW = ("reduce_from", "reduce_scatter", "gather", "copy_to"), (torch.float32, torch.bfloat16)
FAULTS = ("undropped", "dropped", "unsummed")


def _axis(rank):
    return Axis("tensor", N, rank, tuple(range(N)), dist.group.WORLD)


def _random(kind, shape, rank, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + (0 if kind == "replicated" else 100 * rank))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    """(op, dtype) → arguments, results, gradients of the results and of the arguments, each by rank: all from one start of the ranks."""
    by_rank = run_ranks(N, _apply_all, directory=tmp_path_factory.mktemp("ranks"))
    return {key: tuple(zip(*(found[key] for found in by_rank))) for key in by_rank[0]}


def _apply_all(rank):
    cases = [(name, torch.float64) for name in OPS] + [(name, dtype) for name in SUMS for dtype in LOW]
    return {case: _apply(rank, *case) for case in cases} | {("exchange", d): _exchange(rank, d) for d in (torch.float64, *LOW)}


def _apply(rank, name, dtype):
    op, source, target, _ = OPS[name]
    x = _random(source, SHAPE, rank, 1, dtype).requires_grad_()
    out = op(x, _axis(rank))
    y = _random(target, out.shape, rank, 2, dtype)
    out.backward(y)
    return x.detach(), out.detach(), y, x.grad


def _product(kind, a, b):
    """The inner product over all ranks, where what is replicated counts once."""
    pairs = list(zip(a, b))
    return sum((u * v).sum().item() for u, v in (pairs[:1] if kind == "replicated" else pairs))


@pytest.mark.parametrize("name", OPS)
def test_forward_is_as_told_and_backward_is_the_adjoint(applied, name):
    _, source, target, definition = OPS[name]
    xs, outs, ys, gradients = applied[name, torch.float64]
    for rank, out in enumerate(outs):
        torch.testing.assert_close(out, definition(xs, rank), rtol=1e-14, atol=1e-14)
    if source == "replicated" and name != "dropped":
        assert all(torch.equal(g, gradients[0]) for g in gradients)
    error = abs(_product(target, outs, ys) - _product(source, xs, gradients))
    assert error > 1e-3 if name in FAULTS else error < 1e-12


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_sums_round_once(applied, name, dtype):
    """gloo would add bf16 in bf16 and round twice for three ranks."""
    xs, outs, ys, gradients = applied[name, dtype]
    definition = OPS[name][3]
    for rank, out in enumerate(outs):
        assert out.dtype == dtype and gradients[rank].dtype == dtype
        expected = definition([x.double() for x in xs], rank)
        assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()
    if name == "copy_to":
        expected = sum(y.double() for y in ys)
        assert ((gradients[0].double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def _exchange(rank, dtype):
    send, receive = SENT[rank], [row[rank] for row in SENT]
    x = _random("each", (sum(send), 2), rank, 3, dtype).requires_grad_()
    out = all_to_all(x, send, receive, _axis(rank))
    y = _random("each", out.shape, rank, 4, dtype)
    out.backward(y)
    return x.detach(), out.detach(), y, x.grad


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_rows_are_exchanged_in_uneven_numbers_and_come_back(applied, dtype):
    xs, outs, ys, gradients = applied["exchange", dtype]
    for rank in range(N):
        expected = torch.cat([x.split(SENT[sender])[rank] for sender, x in enumerate(xs)])
        assert torch.equal(outs[rank], expected) and outs[rank].dtype == dtype
        returned = [y.split([SENT[sender][receiver] for sender in range(N)])[rank] for receiver, y in enumerate(ys)]
        assert torch.equal(gradients[rank], torch.cat(returned))


def _plain(rank):
    x = torch.tensor([rank, 10 - rank, 5])
    axis = _axis(rank)
    return sum_over(x, axis), max_over(x, axis)


def test_plain_sums_and_maxima(ranks):
    for total, most in ranks(N, _plain):
        assert total.tolist() == [3, 27, 15] and most.tolist() == [2, 10, 5]


def test_one_rank_touches_no_process_group(monkeypatch):
    monkeypatch.setattr(collectives, "dist", None)
    x, alone = torch.randn(2, 4), Axis("tensor")
    for op in (copy_to, reduce_from, sum_over, max_over):
        assert op(x, alone) is x
    for op in (scatter, join, gather, reduce_scatter):
        assert op(x, alone, 1) is x
    assert all_to_all(x, [2], [2], alone) is x


def _uneven(rank):
    with pytest.raises(ValueError, match=r"dimension 1 of shape \(2, 4\) does not divide over tensor=3"):
        scatter(torch.zeros(2, 4), _axis(rank), 1)
    exchange = Exchange(_axis(rank), [1] * N, [1] * N)
    started = exchange.start(torch.zeros(N, 1))
    with pytest.raises(AssertionError, match="one transfer at a time"):
        exchange.start(torch.zeros(N, 1))
    exchange.wait(started)


def test_what_does_not_divide_and_what_is_under_way_are_refused(ranks):
    ranks(N, _uneven)
