"""What must hold of the decoder whatever its weights: causality, documents, recomputation, precision, small imports."""

import math
import subprocess
import sys

import pytest
import torch

from refractor_core.config.model import AttentionConfig, LatentConfig, ModelConfig, MoeConfig
from refractor_core.model.decoder import Decoder
from refractor_core.parallel.sharding import initialise
from refractor_kernels import linear_cross_entropy

LATENT = LatentConfig(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6)
MOE = MoeConfig(
    num_experts=8, top_k=3, expert_hidden_size=8, num_shared_experts=1, first_dense_layers=1, scoring="sigmoid", num_groups=4,
    top_groups=2, bias_update_rate=0.01,
)  # fmt: skip
GQA = ModelConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    init_std=0.3,
    attention=AttentionConfig(qk_norm="head"),
    moe=MOE,
)
MLA = GQA.model_copy(update={"attention": AttentionConfig(kind="mla", latent=LATENT)})
CAPACITY = GQA.model_copy(update={"moe": MOE.model_copy(update={"capacity_factor": 0.7})})
DENSE = GQA.model_copy(update={"moe": None})
CONFIGS = {"gqa": GQA, "mla": MLA, "capacity": CAPACITY, "dense": DENSE}


def build(config: ModelConfig, seed: int = 0, **options) -> Decoder:
    model = Decoder(config, **{"dtype": torch.float64, **options})
    initialise(model, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias_E"):
            buffer.copy_(torch.linspace(-0.05, 0.05, len(buffer)))
    return model


def random_tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 37, (rows, length), generator=torch.Generator().manual_seed(5))


def total_loss(model: Decoder, tokens_BS, cu_seqlens=None) -> torch.Tensor:
    output = model(tokens_BS, cu_seqlens)
    labels_T = tokens_BS.roll(-1, 1).flatten()
    loss = linear_cross_entropy(output.hidden_BSD.flatten(0, 1), model.head.weight, labels_T).mean()
    for r in output.routers:
        loss = loss + 0.1 * (r.z_loss + r.regret_hinge + (r.count_BE * r.probability_BE).sum()) / r.tokens
    return loss


@pytest.mark.parametrize("name", ["gqa", "mla", "dense"])
def test_a_token_changes_nothing_before_it_nor_in_another_document(name):
    model, tokens = build(CONFIGS[name]), random_tokens()
    cu_seqlens = torch.tensor([0, 4, 9, 12, 24], dtype=torch.int32)
    before = model(tokens, cu_seqlens).logits
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 37  # third token of the second document
    after = model(changed, cu_seqlens).logits
    same = (before == after).all(-1)
    assert same[0, :6].all() and same[0, 9:].all() and same[1].all()
    assert not same[0, 6:9].any()


def test_documents_computed_apart_are_the_same():
    model, tokens = build(MLA), random_tokens(1, 10)
    joined = model(tokens, torch.tensor([0, 4, 10], dtype=torch.int32)).logits
    apart = torch.cat([model(tokens[:, :4]).logits, model(tokens[:, 4:]).logits], dim=1)
    torch.testing.assert_close(joined, apart, rtol=0, atol=1e-12)


def test_sliding_window_bounds_what_a_token_sees():
    config = GQA.model_copy(update={"attention": AttentionConfig(sliding_window=3), "num_layers": 1})
    model, tokens = build(config), random_tokens(1)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 37
    moved = (model(tokens).logits != model(changed).logits).any(-1)[0]
    assert moved.tolist() == [False, False, True, True, True] + [False] * 7


def test_a_zero_head_gives_the_uniform_loss():
    model, tokens = build(GQA), random_tokens()
    with torch.no_grad():
        model.head.weight.zero_()
    hidden = model(tokens).hidden_BSD.flatten(0, 1)
    assert linear_cross_entropy(hidden, model.head.weight, tokens.flatten()).mean().item() == pytest.approx(math.log(37), rel=1e-12)


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_changes_no_gradient(name, kind):
    plain, again = build(CONFIGS[name]), build(CONFIGS[name], activation_checkpointing=kind)
    tokens, cu_seqlens = random_tokens(), torch.tensor([0, 4, 12, 24], dtype=torch.int32)
    for model in (plain, again):
        total_loss(model, tokens, cu_seqlens).backward()
    for (parameter_name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), parameter_name


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_saves_memory(kind):
    def saved(activation_checkpointing: str) -> int:
        model, held = build(GQA, activation_checkpointing=activation_checkpointing), {}
        pack = lambda t: held.setdefault(t.data_ptr(), t.numel()) and t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            total_loss(model, random_tokens())
        return sum(held.values())

    assert saved(kind) < saved("none")


def test_every_parameter_gets_a_gradient_and_none_is_nan():
    for name, config in CONFIGS.items():
        model = build(config)
        total_loss(model, random_tokens(4, 16)).backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), (name, parameter_name)


def test_gradients_are_those_of_finite_differences():
    # Without bias and groups, for the regret has a deliberate stop-gradient and the choice has jumps.
    moe = MoeConfig(num_experts=4, top_k=4, expert_hidden_size=8, num_shared_experts=1, first_dense_layers=1)
    model, tokens = build(MLA.model_copy(update={"moe": moe})), random_tokens(1, 8)
    total_loss(model, tokens).backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += 1e-6 * direction
            up = total_loss(model, tokens)
            parameter -= 2e-6 * direction
            down = total_loss(model, tokens)
            parameter += 1e-6 * direction
        expected = ((up - down) / 2e-6).item()
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=2e-4, abs=2e-6), name


def test_tied_embeddings_are_one_parameter():
    model = build(GQA.model_copy(update={"tie_embeddings": True}))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_initial_values_follow_the_config():
    model = Decoder(GQA.model_copy(update={"hidden_size": 64, "vocab_size": 500}))
    initialise(model, 0)
    assert model.embedding.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.layers[1].attention.o_proj.weight.std().item() == pytest.approx(0.3 / math.sqrt(6), rel=0.05)
    assert model.layers[1].feed_forward.experts.down_EDF.std().item() == pytest.approx(0.3 / math.sqrt(6), rel=0.05)
    assert (model.norm.weight == 1).all()
    assert model.layers[1].feed_forward.experts.gate_up_EFD.spec.expert


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_near_float64(dtype):
    small, tokens = build(DENSE, dtype=dtype), random_tokens()
    exact = Decoder(DENSE, dtype=torch.float64)
    exact.load_state_dict(small.state_dict())
    error = (small(tokens).logits.double() - exact(tokens).logits).norm() / exact(tokens).logits.norm()
    assert error < 20 * torch.finfo(dtype).eps


def test_routing_is_float32_at_least_in_a_bf16_model():
    output = build(GQA, dtype=torch.bfloat16)(random_tokens())
    assert output.hidden_BSD.dtype == torch.bfloat16
    assert {r.z_loss.dtype for r in output.routers} == {torch.float32}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_kv_heads = 3"):
        Decoder(GQA.model_copy(update={"num_kv_heads": 3}))
    with pytest.raises(ValueError, match="must be even"):
        Decoder(GQA.model_copy(update={"head_dim": 7}))
    with pytest.raises(ValueError, match="activation_checkpointing='some'"):
        Decoder(GQA, activation_checkpointing="some")
    with pytest.raises(ValueError, match=r"tokens_BS has shape \(3,\)"):
        build(GQA)(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend='nothing'"):
        build(GQA, kernels="nothing")(random_tokens())


def test_imports_need_torch_and_the_config_only():
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"transformers", "safetensors", "tokenizers", "datasketch", "prometheus_client", "jinja2", "matplotlib", "tqdm", "scipy",
                    "pandas", "zstandard", "triton"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import refractor_core.model.decoder, refractor_core.model.hub, refractor_kernels
print(sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "safetensors"}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
