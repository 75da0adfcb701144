"""Random tiny Hugging Face models of the four families, and the float64 oracle made of their own code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}

COMMON = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": None}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MLA = {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "moe_intermediate_size": 8,
    "intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
QWEN = {**GQA, "head_dim": 8, "intermediate_size": 20, "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
OLMOE = {**GQA, "intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}
MIXTRAL = {**GQA, "intermediate_size": 16, "num_local_experts": 5, "num_experts_per_tok": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral-window-tied": ("Mixtral", {**MIXTRAL, "sliding_window": 5, "tie_word_embeddings": True, "head_dim": 10}),
    "mixtral-yarn": ("Mixtral", {**MIXTRAL, "head_dim": 6, "rope_parameters": YARN}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe-window-linear": (
        "Qwen3Moe",
        {
            **QWEN,
            "use_sliding_window": True,
            "sliding_window": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
        },
    ),
    "qwen3_moe-dense-tied": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [0], "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe-clip-normalised": ("Olmoe", {**OLMOE, "clip_qkv": 0.7, "norm_topk_prob": True}),
    "deepseek_v3": ("DeepseekV3", {**MLA, "q_lora_rank": 9, "first_k_dense_replace": 1, "rms_norm_eps": 1e-4}),
    "deepseek_v3-direct-halves": (
        "DeepseekV3",
        {
            **MLA,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
        },
    ),
    "deepseek_v3-yarn": (
        "DeepseekV3",
        {
            **MLA,
            "q_lora_rank": 9,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
}


class LiftFloat32(TorchFunctionMode):
    """Every cast to float32 in the code under it becomes one to float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        lift = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(lift, args), **{key: lift(value) for key, value in (kwargs or {}).items()})


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Default format of new tensors; in float64 Hugging Face's own casts are lifted too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if dtype == torch.float64:
            with LiftFloat32():
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(before)


def hub_model(case: str, seed: int, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A model with unit-scale weights, norms and biases included: what is left at one or zero hides mistakes."""
    import transformers

    family, values = CASES[case]
    with precision(dtype):
        config = getattr(transformers, f"{family}Config")(**{**COMMON, **values, **changes})
        config._attn_implementation = config._experts_implementation = "eager"
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "inv_freq" in name:
                    continue
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                scale = 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
                tensor.copy_(noise * scale + (1.0 if tensor.dim() == 1 and "bias" not in name else 0.0))
    return model.train()


def run_hub(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, language-model loss, gradients by Hugging Face's in-memory names)."""
    model.zero_grad()
    with precision(next(model.parameters()).dtype):
        out = model(tokens_BS, labels=tokens_BS, use_cache=False)
        out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}


_RENAMED = (
    ("model.embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("model.norm", "norm"),
    ("model.layers", "layers"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "feed_forward_norm"),
    ("self_attn", "attention"),
    ("_layernorm", "_norm"),
    ("_with_mqa", ""),
    ("mlp.gate.weight", "feed_forward.router.weight"),
    (".experts.gate_up_proj", ".experts.gate_up_EFD"),
    (".experts.down_proj", ".experts.down_EDF"),
    ("shared_experts", "shared"),
    ("mlp", "feed_forward"),
)


def in_our_names(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a Hugging Face model under the decoder's names, gate and up joined."""
    found: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        found[name] = gradient
    for name in [name for name in found if name.endswith("gate_proj.weight")]:
        stem = name.removesuffix("gate_proj.weight")
        found[f"{stem}gate_up_FD"] = torch.cat([found.pop(name), found.pop(f"{stem}up_proj.weight")])
        found[f"{stem}down_DF"] = found.pop(f"{stem}down_proj.weight")
    return found


def save(model: nn.Module, path: Path) -> Path:
    """The directory Hugging Face itself writes."""
    model.save_pretrained(path)
    return path
