"""Context parallelism: attention, gradients, losses and probes agree with one process, and the ring hides its transfers.

Documents of one token, of several chunks, and with their boundaries on and off the chunks' edges.
"""

import math

import pytest
import torch

from refractor_core.config.model import AttentionConfig
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.parallel import context_attention as ring
from refractor_core.parallel.context import ContextSplit
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.sharding import initialise
from refractor_core.verify.layouts import verify_layouts
from refractor_kernels import attention
from tests.distributed.documents import write
from tests.distributed.lattice import MODELS
from tests.distributed.long_context import step
from tests.distributed.test_layers import CONFIG, DENSE
from tests.kernels import oracles
from tests.ranks import run_ranks

CU = torch.tensor([0, 1, 2, 9, 10, 16, 24, 25, 32], dtype=torch.int32)  # two rows of 16: eight chunks of two, or four of four
CASES = {  # documents, window, head counts, widths
    "documents": (CU, None, (4, 2), (8, 8)),
    "one document": (None, None, (2, 2), (4, 6)),
    "window": (None, 5, (2, 1), (8, 4)),
    "documents and window": (CU, 3, (4, 1), (4, 4)),
    "a token alone": (torch.arange(33, dtype=torch.int32), None, (2, 1), (4, 4)),
}
EXCHANGES = ("ring", "all_gather")


def _tensors(case, dtype):
    _, _, (heads, groups), (width, value_width) = CASES[case]
    g = torch.Generator().manual_seed(len(case))
    shapes = [(2, 16, heads, width), (2, 16, groups, width), (2, 16, groups, value_width), (2, 16, heads, value_width)]
    *inputs, grad = (torch.randn(shape, generator=g, dtype=torch.float64).bfloat16().to(dtype) for shape in shapes)
    return inputs, grad


def _plain(case, dtype):
    (q, k, v), grad = _tensors(case, dtype)
    cu, window, *_ = CASES[case]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = oracles.attention(q, k, v, cu, 0.3, window)[0] if dtype != torch.float64 else attention(q, k, v, cu, scale=0.3, window=window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def _attended(rank, degree, dtypes):
    mesh, found = Mesh.create(Layout(4, context=degree, data_shard=4 // degree), rank), {}
    for exchange in EXCHANGES:
        split = ContextSplit(mesh.axis("context"), exchange=exchange)
        for case, (cu, window, *_) in CASES.items():
            for dtype in dtypes:
                inputs, grad = _tensors(case, dtype)
                q, k, v = (split.own(t).requires_grad_() for t in inputs)
                out = ring.context_attention(q, k, v, cu, split=split, scale=0.3, window=window)
                found[exchange, case, dtype] = [out.detach(), *torch.autograd.grad(out, (q, k, v), split.own(grad))]
    return found


@pytest.mark.parametrize("degree", [2, 4])
def test_attention_equals_one_process_in_every_format(ranks, degree):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    by_rank = ranks(4, _attended, degree, dtypes)[:degree]
    split = ContextSplit(Axis("context", degree, 0, tuple(range(degree))))
    for exchange, case, dtype in by_rank[0]:
        parts = zip(*(found[exchange, case, dtype] for found in by_rank))
        whole = [split.in_order(torch.cat(part, 1)) for part in parts]
        exact = _plain(case, torch.float64)
        if dtype == torch.float64:
            oracles.assert_exact(whole, exact, 1e-13)
        else:
            assert all(t.dtype == dtype for t in whole)
            oracles.assert_near(whole, _plain(case, dtype), exact)


LAYOUTS = {
    "gqa-dropless": ["context=2,tensor=2,sequence=true", "context=4,context_exchange=all_gather"],
    "gqa-capacity-tied": ["context=2,tensor=2", "context=4,expert=2"],
    "one-kv-head": ["context=2,tensor=2,expert=2,expert_tensor=2"],
    "mla-capacity": ["context=2,tensor=2,sequence=true,expert=4,context_exchange=all_gather", "context=2,data_shard=2,expert=2"],
    "mla-direct-query": ["context=4"],
    "dense-window": ["context=4", "context=2,tensor=2,sequence=true,context_exchange=all_gather"],
}
OF_EIGHT = ["context=4,tensor=2,sequence=true,expert=4", "context=2,tensor=4,expert=2,context_exchange=all_gather"]


def _verify(folder, model, layouts):
    for result in verify_layouts(write(folder, **MODELS[model]), layouts):
        assert result.passed, f"{result.layout}: {result.worst_parameter} {result.worst_gradient_error:.1e}\n{result.culprit}"


@pytest.mark.parametrize("model", LAYOUTS)
def test_loss_and_gradients_agree_with_one_process(tmp_path, model):
    _verify(tmp_path, model, LAYOUTS[model])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["one-kv-head", "mla-capacity"])
def test_eight_ranks_agree_with_one_process(tmp_path, model):
    _verify(tmp_path, model, OF_EIGHT)


def test_low_precision_stays_within_the_formats_tolerance(tmp_path):
    for dtype in ("float32", "bf16"):
        for result in verify_layouts(write(tmp_path), ["context=2,tensor=2", "context=2,context_exchange=all_gather"], dtype=dtype):
            assert result.passed, result.culprit


TOKENS = torch.arange(32).view(2, 16)
MODELS_PROBED = {
    "dense": DENSE,
    "window": DENSE.model_copy(update={"attention": AttentionConfig(sliding_window=6)}),
    "experts": CONFIG,
}


def _hidden(rank, config, layout):
    """Hidden states of tokens, and of those with one of them changed: each one in turn of row 0's document [2, 9)."""
    mesh = Mesh.create(layout, rank)
    model = Decoder(config, mesh=mesh, dtype=torch.float64)
    initialise(model, 0)
    found = []
    with torch.no_grad():
        for changed in (None, 2, 5, 8):
            tokens = TOKENS.clone()
            if changed is not None:
                tokens[0, changed] = 39
            found.append(model(tokens, CU).hidden_BSD)
    return found, ContextSplit.of(mesh).positions(16)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", MODELS_PROBED)
def test_a_changed_token_changes_no_other_document(ranks, name, degree, exchange):
    layout = Layout(4, context=degree, data_shard=4 // degree, context_exchange=exchange)
    by_rank = ranks(4, _hidden, MODELS_PROBED[name], layout)[:degree]
    order = torch.cat([places for _, places in by_rank]).argsort()
    before, *changed = (torch.cat(parts, 1)[:, order] for parts in zip(*(found for found, _ in by_rank)))
    alone, _ = _hidden(0, MODELS_PROBED[name], Layout(1))
    torch.testing.assert_close(before, alone[0], rtol=0, atol=1e-12)
    for place, after in zip((2, 5, 8), changed):
        same = torch.ones(2, 16, dtype=torch.bool)
        same[0, place:9] = False
        difference = (after - before).abs().amax(-1)
        assert (difference[~same] > 1e-6).all()
        assert (difference[same] <= (1e-12 if name == "experts" else 0.0)).all()  # experts' rows come in other numbers


def _zero_head(rank, layout):
    mesh = Mesh.create(layout, rank)
    model = Decoder(CONFIG, mesh=mesh, dtype=torch.float64)
    initialise(model, 0)
    torch.nn.init.zeros_(model.head.weight)
    labels = ContextSplit.of(mesh).own(TOKENS)
    return language_model_loss(model(TOKENS), labels, model.head.weight, TOKENS.numel(), axis=mesh.axis("tensor")).item()


def test_a_zeroed_head_gives_the_uniform_loss(ranks):
    assert sum(ranks(4, _zero_head, Layout(4, context=4))) == pytest.approx(math.log(40), rel=1e-12)
    assert sum(ranks(4, _zero_head, Layout(4, context=2, tensor=2, sequence=True))[::2]) == pytest.approx(math.log(40), rel=1e-12)


def _order(rank):
    told, start = [], ring.start_shift
    for name in ("span_attention", "span_attention_backward"):
        whole = getattr(ring, name)
        setattr(ring, name, lambda *args, whole=whole, **options: (told.append("attend"), whole(*args, **options))[1])

    def started(x, axis):
        told.append(("launch", x.numel()))
        finish = start(x, axis)
        return lambda: (told.append("wait"), finish())[1]

    ring.start_shift = started
    split = ContextSplit(Mesh.create(Layout(4, context=4), rank).axis("context"))
    q, k, v = (torch.randn(2, 4, heads, width, requires_grad=True) for heads, width in ((4, 8), (2, 8), (2, 6)))
    out = ring.context_attention(q, k, v, CU, split=split, scale=1.0)
    forward = told.copy()
    told.clear()
    out.sum().backward()
    return forward, told


def test_the_next_block_is_under_way_while_this_one_is_attended_to(ranks):
    """Forward C − 1 transfers of B·s·G·(D + E) elements; backward as many, and C of the blocks' gradients, which come a step behind."""
    launch = ("launch", 2 * 4 * 2 * (8 + 6))
    for forward, backward in ranks(4, _order):
        assert forward == [launch, "attend", "wait"] * 3 + ["attend"]
        first, middle, last = (
            [launch, "attend", launch, "wait"],
            [launch, "attend", "wait", launch, "wait"],
            ["attend", "wait", launch, "wait"],
        )
        assert backward == first + middle * 2 + last


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_at_131072_tokens_stays_under_four_gibibytes_a_rank(tmp_path):
    for found in run_ranks(2, step, 1 << 17, Layout(2, context=2), directory=tmp_path, timeout=3000):
        assert math.isfinite(found["grad_norm"]) and found["peak_gib"] < 4
