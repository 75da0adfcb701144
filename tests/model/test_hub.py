"""Hugging Face directories in and out: bit for bit, readable by Transformers, refused with the key where not supported."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refractor_core.config.model import AttentionConfig, ModelConfig, MoeConfig, RopeConfig, RopeScalingConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.hub import config_from_hub, directory, export_hub, import_hub
from refractor_core.parallel.sharding import initialise
from tests.model.families import CASES, hub_model, save


def stored(path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact_and_transformers_loads_it(case, dtype, tmp_path):
    import transformers

    theirs = hub_model(case, 3, dtype)
    model = import_hub(save(theirs, tmp_path / "in"), None)
    export_hub(model, tmp_path / "out", shard_bytes=20_000)
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name].to(tensor.dtype)), name
        assert tensor.dtype == after[name].dtype or "correction_bias" in name, name
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor.to(dtype), again.state_dict()[name].to(dtype)), name
    explicit = model.config.model_copy(update={"head_dim": model.config.head_width} if "mixtral" in case else {})
    assert import_hub(tmp_path / "out", None).config == explicit


def test_older_config_files_are_read():
    values = {
        "model_type": "mixtral", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0, "max_position_embeddings": 128,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    }  # fmt: skip
    rope = config_from_hub(values).rope
    assert (rope.theta, rope.scaling.kind, rope.scaling.factor, rope.scaling.original_context) == (5000.0, "yarn", 2.0, 64)
    assert config_from_hub({**values, "rope_theta": None, "rope_scaling": None}).rope == RopeConfig(theta=1e6)


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("mixtral", "hidden_act", "gelu"),
        ("mixtral", "attention_dropout", 0.1),
        ("mixtral", "router_jitter_noise", 0.1),
        ("mixtral", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1.0}),
        ("mixtral", "rope_parameters", {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}),
        ("mixtral", "partial_rotary_factor", 0.5),
        ("mixtral", "model_type", "llama"),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "attention_bias", True),
        ("olmoe", "sliding_window", 8),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "num_key_value_heads", 1),
        ("deepseek_v3", "quantization_config", {"quant_method": "fp8"}),
        ("deepseek_v3", "kv_lora_rank", None),
    ],
)
def test_what_is_not_supported_is_refused_by_key(case, key, value, tmp_path):
    path = save(hub_model(case, 0, torch.float32), tmp_path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {key: value}))
    key = next((name for name in ("rope_type", "attention_factor") if isinstance(value, dict) and name in value), key)
    with pytest.raises(ValueError, match="config.json") as error:
        import_hub(path)
    assert key in str(error.value) or "attention_factor" in str(error.value)


def edit(path, change) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is in none"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}), "q_proj.bias"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"shape \(3,\), expected \(24,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    path = save(hub_model("mixtral", 0, torch.float32), tmp_path)
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        import_hub(path)


def test_multi_token_prediction_is_left_out_with_a_warning(tmp_path):
    path = save(hub_model("deepseek_v3", 0, torch.float32), tmp_path)
    edit(path, lambda t: t.update({"model.layers.2.eh_proj.weight": torch.zeros(2, 2)}))
    with pytest.warns(UserWarning, match="multi-token prediction"):
        import_hub(path)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json: not there"):
        import_hub(tmp_path)
    path = save(hub_model("mixtral", 0, torch.float32), tmp_path / "model")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        import_hub(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: not there"):
        import_hub(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        import_hub(path)


MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=8)
SHARED = MOE.model_copy(update={"num_shared_experts": 1})
PLAIN = ModelConfig(vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, moe=MOE)


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        (PLAIN.model_copy(update={"moe": None}), None, "model.moe = null"),
        (PLAIN.model_copy(update={"moe": SHARED}), None, "model.moe.num_shared_experts = 1"),
        (PLAIN.model_copy(update={"attention": AttentionConfig(qk_norm="head")}), "olmoe", "olmoe cannot express model.attention.qk_norm"),
        (PLAIN.model_copy(update={"rope": RopeConfig(interleaved=True)}), "mixtral", "model.rope.interleaved"),
        (PLAIN.model_copy(update={"num_kv_heads": 1, "moe": SHARED}), None, "(?s)mixtral cannot .*olmoe cannot .*deepseek_v3 cannot"),
        (PLAIN, "llama", "family = 'llama'"),
    ],
)
def test_a_model_that_no_family_expresses_is_not_exported(config, family, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_hub(Decoder(config), tmp_path / "out", family)
    assert not (tmp_path / "out").exists()


def test_our_own_models_are_exported_with_the_family_found(tmp_path):
    scaling = RopeScalingConfig(factor=2.0, original_context=2048)
    moe = MOE.model_copy(update={"first_dense_layers": 1, "capacity_factor": 1.5})
    attention = AttentionConfig(qk_norm="head")
    config = PLAIN.model_copy(update={"attention": attention, "rope": RopeConfig(scaling=scaling), "moe": moe, "dense_hidden_size": None})
    model = Decoder(config)
    initialise(model, 0)
    with pytest.warns(UserWarning, match="capacity_factor = 1.5.*dropless"):
        export_hub(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert (told["model_type"], told["max_position_embeddings"]) == ("qwen3_moe", 4096)
    tokens = torch.arange(8).unsqueeze(0)
    dropless = config.model_copy(update={"moe": moe.model_copy(update={"capacity_factor": None})})
    expected = Decoder(dropless)
    expected.load_state_dict(model.state_dict())
    assert torch.equal(import_hub(tmp_path)(tokens).logits, expected(tokens).logits)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_export_that_cannot_be_written_leaves_nothing_and_one_that_would_overwrite_is_refused(tmp_path, monkeypatch):
    model = Decoder(PLAIN.model_copy(update={"moe": MOE.model_copy(update={"first_dense_layers": 0})}))
    initialise(model, 0)
    real = directory.json.dumps

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory.json, "dumps", full)
    with pytest.raises(OSError, match="No space left"):
        export_hub(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(directory.json, "dumps", real)
    export_hub(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="give a new directory"):
        export_hub(model, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
