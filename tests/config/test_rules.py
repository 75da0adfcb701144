"""Every rule between keys refuses a document, and lets its neighbour pass."""

from collections.abc import Callable
from pathlib import Path

import pytest

from refractor_core.config import ConfigError, load_run, rules

MLA = "model.attention.kind=mla"
EMA = "checkpoint.ema_decay=0.9"

DEEPSPEED, FP32 = "parallel.engine=deepspeed", "precision.compute=fp32"
CASES = [
    # rule, what fails, the key that is named, what passes, ranks
    ("head_width", ["model.num_heads=6"], "model.num_heads", ["model.num_heads=8"], None),
    ("head_width", ["model.num_heads=64"], "model.num_heads", ["model.num_heads=32"], None),
    ("head_width", ["model.head_dim=9"], "model.head_dim", ["model.head_dim=10"], None),
    ("head_width", ["model.num_heads=6"], "model.num_heads", ["model.num_heads=6", MLA], None),
    ("kv_heads", ["model.num_kv_heads=3"], "model.num_kv_heads", ["model.num_kv_heads=4"], None),
    ("latent_attention", [MLA, "model.attention.qk_norm=head"], "model.attention.qk_norm", ["model.attention.qk_norm=head"], None),
    ("latent_attention", [MLA, "model.attention.qkv_clip=8"], "model.attention.qkv_clip", ["model.attention.qkv_clip=8"], None),
    (
        "latent_attention",
        [MLA, "model.attention.latent.qk_rope_head_dim=7"],
        "model.attention.latent.qk_rope_head_dim",
        [MLA, "model.attention.latent.qk_rope_head_dim=8"],
        None,
    ),
    (
        "yarn_bounds",
        ["model.rope.scaling={factor: 2, original_context: 64, beta_fast: 1}"],
        "model.rope.scaling.beta_fast",
        ["model.rope.scaling={factor: 2, original_context: 64, beta_fast: 2}"],
        None,
    ),
    (
        "stages_yarn_bounds",
        ["curriculum.stages.1.rope_scaling={factor: 2, original_context: 32, beta_fast: 1}"],
        "curriculum.stages.1.rope_scaling.beta_fast",
        ["curriculum.stages.1.rope_scaling={factor: 2, original_context: 32, beta_fast: 2}"],
        None,
    ),
    (
        "stages_stretch_enough",
        ["curriculum.stages.1.rope_scaling={factor: 1.9, original_context: 32}"],
        "curriculum.stages.1.rope_scaling.factor",
        ["curriculum.stages.1.rope_scaling={factor: 2, original_context: 32}"],
        None,
    ),
    ("experts_per_token", ["model.moe.top_k=9"], "model.moe.top_k", ["model.moe.top_k=8"], None),
    ("expert_groups", ["model.moe.num_groups=3"], "model.moe.num_groups", ["model.moe.num_groups=4"], None),
    ("expert_groups", ["model.moe.num_groups=8", "model.moe.top_groups=2"], "model.moe.num_groups", ["model.moe.num_groups=4"], None),
    ("expert_groups", ["model.moe.num_groups=2", "model.moe.top_groups=3"], "model.moe.top_groups", ["model.moe.num_groups=2"], None),
    (
        "expert_groups",
        ["model.moe={num_groups: 4, top_groups: 1, top_k: 3}"],
        "model.moe.top_k",
        ["model.moe={num_groups: 4, top_groups: 2, top_k: 3}"],
        None,
    ),
    ("dense_layers", ["model.moe.first_dense_layers=3"], "model.moe.first_dense_layers", ["model.moe.first_dense_layers=2"], None),
    ("engine_fits", ["parallel={engine: fsdp2, data_shard: 1}"], "parallel.engine", ["parallel={engine: fsdp2, data_shard: 2}"], None),
    ("engine_fits", ["parallel.engine=fsdp2"], "parallel.engine", ["parallel.engine=fsdp2"], (1, 2)),
    *(
        ("deepspeed_fits", [f"parallel={{engine: deepspeed, {name}: 2}}", FP32], "parallel.engine", [DEEPSPEED, FP32], None)
        for name in ("pipeline", "context", "data_replicate", "expert", "expert_tensor")
    ),
    ("deepspeed_fits", [DEEPSPEED, FP32, "optimizer.kind=adafactor"], "parallel.engine", [DEEPSPEED, FP32], None),
    ("deepspeed_fits", [DEEPSPEED, "precision.compute=fp64"], "precision.compute", [DEEPSPEED, FP32], None),
    ("deepspeed_fits", [DEEPSPEED, "precision.compute=fp16"], "parallel.deepspeed", [DEEPSPEED, "parallel.deepspeed.stage=3"], None),
    *(
        (
            "deepspeed_fits",
            [DEEPSPEED, FP32, f"parallel.deepspeed={wrong}"],
            f"parallel.deepspeed.{key}",
            [DEEPSPEED, FP32, f"parallel.deepspeed={right}"],
            None,
        )
        for key, wrong, right in (
            ("offload_folder", "{offload: disk}", "{offload: disk, offload_folder: /scratch}"),
            ("offload_folder", "{offload: cpu, offload_folder: /scratch}", "{offload: cpu}"),
            ("offload_weights", "{stage: 2, offload: cpu, offload_weights: true}", "{stage: 3, offload: cpu, offload_weights: true}"),
            ("offload_weights", "{stage: 3, offload_weights: true}", "{stage: 3, offload: disk, offload_folder: a, offload_weights: true}"),
        )
    ),
    ("deepspeed_fits", [DEEPSPEED], "parallel.deepspeed", [DEEPSPEED, "parallel.deepspeed.stage=2"], None),
    ("deepspeed_fits", [DEEPSPEED, "parallel.deepspeed={stage: 2, offload: cpu}"], "parallel.deepspeed", [DEEPSPEED, FP32], None),
    ("batch_division", ["batch.micro_batch_size=3"], "batch.global_batch_size", ["batch.micro_batch_size=4"], None),
    ("batch_division", [], "batch.global_batch_size", [], (3, 4)),
    (
        "batch_division",
        ["curriculum.stages.1.global_batch_size=9"],
        "curriculum.stages.1.global_batch_size",
        ["curriculum.stages.1.global_batch_size=10"],
        None,
    ),
    ("mixture_names", ["data.mixture.shares={cod: 1}"], "data.mixture.shares.cod", ["data.mixture.shares={code: 1}"], None),
    ("mixture_names", ["data.mixture.shares={code: 0}"], "data.mixture.shares", ["data.mixture.shares={code: 0, books: 1}"], None),
    (
        "mixture_names",
        ["curriculum.stages.1.shares={b: 1}"],
        "curriculum.stages.1.shares.b",
        ["curriculum.stages.1.shares={books: 1}"],
        None,
    ),
    (
        "mixture_names",
        ["data.mixture.source_max_epochs={b: 1}"],
        "data.mixture.source_max_epochs.b",
        ["data.mixture.source_max_epochs={books: 1}"],
        None,
    ),
    (
        "stages_take_documents",
        ["curriculum.stages.0={min_document_tokens: 5, max_document_tokens: 4}"],
        "curriculum.stages.0.max_document_tokens",
        ["curriculum.stages.0={min_document_tokens: 5, max_document_tokens: 5}"],
        None,
    ),
    (
        "stages_take_documents",
        ["curriculum.stages.0={temperature: 2, shares: {code: 1}}"],
        "curriculum.stages.0.temperature",
        ["curriculum.stages.0.temperature=2"],
        None,
    ),
    ("batch_division", ["parallel.data_shard=3"], "batch.global_batch_size", ["parallel.data_shard=4"], None),
    ("batch_division", ["parallel.data_replicate=3"], "batch.global_batch_size", ["parallel.data_replicate=2"], None),
    ("source_names", ["data.sources.1.name=code"], "data.sources.1.name", ["data.sources.1.name=other"], None),
    ("tokenizer_path", ["data.tokenizer.kind=file"], "data.tokenizer.path", ["data.tokenizer.path=t.json"], None),
    ("tokenizer_path", ["data.tokenizer={kind: train_bpe, path: t.json}"], "data.tokenizer.path", ["data.tokenizer.path=t.json"], None),
    ("stages_ascend", ["curriculum.stages.0.until_step=30"], "curriculum.stages.1.until_step", ["curriculum.stages.0.until_step=29"], None),
    ("curriculum_covers", ["run.steps=31"], "curriculum.stages.1.until_step", ["run.steps=29"], None),
    ("warmup_fits", ["schedule.warmup_steps=30"], "schedule.warmup_steps", ["schedule.warmup_steps=29"], None),
    ("vocabulary", ["model.vocab_size=256"], "model.vocab_size", ["model.vocab_size=257"], None),
    ("vocabulary", ["model.vocab_size=256"], "model.vocab_size", ["model.vocab_size=256", "data.tokenizer.path=t.json"], None),
    *(
        (
            "filter_rules",
            [f"data.filters.{name}=[{{signal: words, {bad}}}]"],
            f"data.filters.{name}.0.min",
            [f"data.filters.{name}=[{{signal: words, {good}}}]"],
            None,
        )
        for name in ("rules", "extra_rules")
        for bad, good in (("kind: prose", "kind: prose, max: 1"), ("min: 3, max: 2", "min: 2, max: 2"))
    ),
    *(
        (
            "rules_name_sources",
            [f"data.filters.{name}=[{{signal: words, min: 1, sources: [none]}}]"],
            f"data.filters.{name}.0.sources",
            [f"data.filters.{name}=[{{signal: words, min: 1, sources: [code]}}]"],
            None,
        )
        for name in ("rules", "extra_rules")
    ),
    ("perplexity_fits", ["data.perplexity.backend=kenlm"], "data.perplexity.path", ["data.perplexity={backend: kenlm, path: m}"], None),
    ("perplexity_fits", ["data.perplexity.path=m"], "data.perplexity.path", ["data.perplexity.backend=none"], None),
    (
        "perplexity_fits",
        ["data.perplexity={backend: checkpoint, path: m}"],
        "data.perplexity.tokenizer_path",
        ["data.perplexity={backend: checkpoint, path: m, tokenizer_path: t}"],
        None,
    ),
    (
        "perplexity_fits",
        ["data.perplexity.quantiles=[0.6, 0.6]"],
        "data.perplexity.quantiles",
        ["data.perplexity.quantiles=[0.5, 0.6]"],
        None,
    ),
    *(
        ("bands", [f"objectives.{name}.band=[1, 1]"], f"objectives.{name}.band", [f"objectives.{name}.band=[1, 1.1]"], None)
        for name in ("load_balance", "z_loss", "regret")
    ),
    ("averaged_weights", ["evaluation.weights=ema"], "evaluation.weights", ["evaluation.weights=ema", EMA], None),
]


@pytest.mark.parametrize(("rule", "fails", "key", "passes", "ranks"), CASES)
def test_rule_refuses_a_document_and_lets_its_neighbour_pass(
    write: Callable[..., Path], sound: dict, rule: str, fails: list[str], key: str, passes: list[str], ranks: tuple[int, int] | None
) -> None:
    bad, good = ranks or (None, None)
    path = write(sound)
    with pytest.raises(ConfigError) as caught:
        load_run(path, fails, world_size=bad)
    assert [problem.key for problem in caught.value.problems] == [key]
    load_run(path, passes, world_size=good)


def test_every_rule_has_a_case_that_only_it_refuses(write: Callable[..., Path], sound: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {case[0] for case in CASES} == {rule.__name__ for rule in rules.RULES}
    path = write(sound)
    for name, fails, _, _, ranks in CASES:
        with monkeypatch.context() as patch:
            patch.setattr(rules, "RULES", tuple(rule for rule in rules.RULES if rule.__name__ != name))
            load_run(path, fails, world_size=ranks and ranks[0])


def test_objectives_on_a_dense_model_are_fine(write: Callable[..., Path], sound: dict) -> None:
    sound["model"]["moe"] = None
    load_run(write(sound))


def test_a_rule_is_silent_about_keys_that_the_schema_refused(write: Callable[..., Path], sound: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(
            write(sound),
            [
                "model.moe.num_experts=x",
                "model.moe.top_k=900",
                "model.moe.num_groups=x",
                "model.moe.top_groups=5",
                "run.steps=0",
                "schedule.warmup_steps=99",
            ],
        )
    assert {problem.key for problem in caught.value.problems} == {"model.moe.num_experts", "model.moe.num_groups", "run.steps"}
