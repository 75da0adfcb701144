"""Rules that hold between keys of a run's document; what a single value may be is the schema's business.

A rule is a small generator of problems. It reads the keys it needs; when the schema has refused one of them, the rule is silent, because
that mistake is already reported.
"""

from collections.abc import Callable, Iterator, Sequence

from refractor_core.config.errors import Problem
from refractor_core.config.model import RopeScalingConfig
from refractor_core.config.run import RunConfig

Rule = Callable[[RunConfig, int | None], Iterator[Problem]]

BYTES_AND_END = 257
"""A byte-level vocabulary holds every byte and the end of a document."""


def check(config: RunConfig, world_size: int | None = None, partial: bool = False, rules: Sequence[Rule] | None = None) -> list[Problem]:
    """Every mistake across sections.

    Args:
        config: the run.
        world_size: number of ranks, if known.
        partial: ``config`` lacks the fields that the schema refused; rules that read one stop there.
        rules: what the caller's work needs to hold; None: what training needs.
    """
    problems: list[Problem] = []
    for rule in RULES if rules is None else rules:
        try:
            problems.extend(rule(config, world_size))
        except AttributeError:
            if not partial:
                raise
    return problems


def head_width(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    model = config.model
    if model.attention.kind != "gqa":
        return
    if model.head_dim is None and model.hidden_size % model.num_heads:
        expected = f"must divide model.hidden_size = {model.hidden_size}; change one of them or set model.head_dim"
        yield Problem("model.num_heads", model.num_heads, expected)
        return
    width = model.head_dim or model.hidden_size // model.num_heads
    if width % 2:
        expected = "rotary positions need an even head width"
        if model.head_dim is None:
            expected = f"gives heads of width {width}; {expected}"
        yield Problem("model.head_dim" if model.head_dim else "model.num_heads", model.head_dim or model.num_heads, expected)


def kv_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    model = config.model
    if model.attention.kind == "gqa" and model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield Problem("model.num_kv_heads", model.num_kv_heads, f"must divide model.num_heads = {model.num_heads}")


def latent_attention(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    attention = config.model.attention
    if attention.kind != "mla":
        return
    if attention.qk_norm != "none":
        yield Problem("model.attention.qk_norm", attention.qk_norm, "latent attention norms its latents instead; write none, or kind: gqa")
    if attention.qkv_clip is not None:
        yield Problem("model.attention.qkv_clip", attention.qkv_clip, "latent attention has no clipping; write null, or kind: gqa")
    width = attention.latent.qk_rope_head_dim
    if width % 2:
        yield Problem("model.attention.latent.qk_rope_head_dim", width, "rotary positions need an even width")


def yarn_bounds(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    yield from _yarn_bounds("model.rope.scaling", config.model.rope.scaling)


def stages_yarn_bounds(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    for index, stage in enumerate(config.curriculum.stages):
        yield from _yarn_bounds(f"curriculum.stages.{index}.rope_scaling", stage.rope_scaling)


def _yarn_bounds(key: str, scaling: RopeScalingConfig | None) -> Iterator[Problem]:
    if scaling and scaling.kind == "yarn" and scaling.beta_fast <= scaling.beta_slow:
        yield Problem(f"{key}.beta_fast", scaling.beta_fast, f"must be above beta_slow = {scaling.beta_slow}")


def stages_stretch_enough(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    for index, stage in enumerate(config.curriculum.stages):
        scaling = stage.rope_scaling
        if scaling and scaling.factor * scaling.original_context < stage.sequence_length:
            needed = stage.sequence_length / scaling.original_context
            reach = f"{scaling.original_context} to {scaling.factor * scaling.original_context:.0f} tokens"
            expected = f"stretches {reach}, but the stage has {stage.sequence_length}; the least factor is {needed:g}"
            yield Problem(f"curriculum.stages.{index}.rope_scaling.factor", scaling.factor, expected)


def experts_per_token(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    moe = config.model.moe
    if moe and moe.top_k > moe.num_experts:
        yield Problem("model.moe.top_k", moe.top_k, f"must be at most model.moe.num_experts = {moe.num_experts}")


def expert_groups(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    moe = config.model.moe
    if not moe:
        return
    if moe.top_groups > moe.num_groups:
        yield Problem("model.moe.top_groups", moe.top_groups, f"must be at most model.moe.num_groups = {moe.num_groups}")
    if moe.num_experts % moe.num_groups:
        yield Problem("model.moe.num_groups", moe.num_groups, f"must divide model.moe.num_experts = {moe.num_experts}")
        return
    size = moe.num_experts // moe.num_groups
    if moe.num_groups > 1 and size < 2:
        yield Problem("model.moe.num_groups", moe.num_groups, "leaves one expert per group; a group's score needs two: use fewer groups")
    allowed = size * min(moe.top_groups, moe.num_groups)
    if allowed < moe.top_k <= moe.num_experts:
        expected = f"must be at most the {allowed} experts of the {moe.top_groups} groups a token may use; raise model.moe.top_groups"
        yield Problem("model.moe.top_k", moe.top_k, expected)


def dense_layers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    model = config.model
    if model.moe and model.moe.first_dense_layers > model.num_layers:
        expected = f"must be at most model.num_layers = {model.num_layers}"
        yield Problem("model.moe.first_dense_layers", model.moe.first_dense_layers, expected)


def engine_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.engine != "fsdp2":
        return
    if parallel.pipeline > 1 or parallel.virtual_pipeline > 1:
        expected = "runs no pipeline: stages free their weights under each other's micro batches; write zero1, or pipeline: 1"
        if parallel.schedule.startswith("zb"):
            expected = f"loses the weights' gradients that schedule {parallel.schedule} computes late: they stay None; write zero1"
        yield Problem("parallel.engine", "fsdp2", expected)
    shard = parallel.data_shard
    if shard == "auto":
        others = parallel.pipeline * parallel.context * parallel.tensor * parallel.data_replicate
        shard = None if world_size is None else world_size // others
    if shard is not None and shard * parallel.context < 2:
        expected = "divides weights over data_shard × context ranks, of which there is one; raise data_shard, or write zero1"
        yield Problem("parallel.engine", "fsdp2", expected)


def deepspeed_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    parallel, options = config.parallel, config.parallel.deepspeed
    if parallel.engine != "deepspeed":
        return
    refused = {
        "pipeline": "runs no pipeline: DeepSpeed's own would replace the schedules",
        "context": "is not proven with context ranks",
        "data_replicate": "divides over all data ranks, without copies",
        "expert": "sums experts' gradients over data_shard ranks, which hold different experts",
        "expert_tensor": "sums experts' gradients over data_shard ranks, which may hold different slices",
    }
    for name, why in refused.items():
        if getattr(parallel, name) > 1:
            yield Problem("parallel.engine", "deepspeed", f"{why}; write {name}: 1, or engine: zero1")
    if config.optimizer.kind != "adamw":
        expected = f"flattens parameters, and {config.optimizer.kind} needs their rows and columns; write kind: adamw, or engine: zero1"
        yield Problem("parallel.engine", "deepspeed", expected)
    compute, stage, offload = config.precision.compute, options.stage, options.offload
    if compute == "fp64":
        yield Problem("precision.compute", compute, "engine deepspeed keeps masters in float32; write fp32, or engine: zero1")
    elif compute != "fp32" and (stage == 1 or stage == 2 and offload != "none"):
        why = f"has a way of its own for {compute}, not proven" if stage == 1 else f"adds micro batches' gradients up in {compute}"
        mend = "write stage: 3, or stage: 2 with offload: none, or compute: fp32, or engine: zero1"
        yield Problem("parallel.deepspeed", f"stage {stage}, offload {offload}", f"{why}; {mend}")
    if offload == "disk" and not options.offload_folder:
        yield Problem("parallel.deepspeed.offload_folder", None, "offload: disk needs a folder on each machine's own disk")
    if offload != "disk" and options.offload_folder is not None:
        expected = f"offload: {offload} reads no folder; write offload: disk"
        yield Problem("parallel.deepspeed.offload_folder", options.offload_folder, expected)
    if options.offload_weights and (stage < 3 or offload == "none"):
        expected = f"stage {stage} with offload: {offload} keeps weights where they are used; write stage: 3 and offload: cpu or disk"
        yield Problem("parallel.deepspeed.offload_weights", True, expected)


def batch_division(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    batch, parallel = config.batch, config.parallel
    if parallel.data_shard != "auto" or world_size is None:
        ranks = (1 if parallel.data_shard == "auto" else parallel.data_shard) * parallel.data_replicate
    else:
        ranks = max(1, world_size // (parallel.pipeline * parallel.context * parallel.tensor))
    share = batch.micro_batch_size * ranks
    yield from _divides("batch.global_batch_size", batch.global_batch_size, share, f"{batch.micro_batch_size} × {ranks}")
    for index, stage in enumerate(config.curriculum.stages):
        if (size := stage.global_batch_size) is not None:
            key = f"curriculum.stages.{index}.global_batch_size"
            yield from _divides(key, size, share, f"{batch.micro_batch_size} × {ranks}")


def _divides(key: str, size: int, share: int, told: str) -> Iterator[Problem]:
    if size % share:
        nearest = max(1, round(size / share)) * share
        yield Problem(key, size, f"must be a multiple of micro_batch_size × data-parallel ranks = {told}; the nearest is {nearest}")


def mixture_names(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    known = {source.name for source in config.data.sources}
    mixture, stages = config.data.mixture, config.curriculum.stages
    given: dict[str, dict[str, float] | None] = {"data.mixture.shares": mixture.shares}
    given |= {f"curriculum.stages.{index}.shares": stage.shares for index, stage in enumerate(stages)}
    for key, shares in given.items():
        if shares is not None and not sum(shares.values()):
            yield Problem(key, shares, "must give at least one source a share above 0")
    for key, named in {**given, "data.mixture.source_max_epochs": mixture.source_max_epochs}.items():
        for name in named or ():
            if name not in known:
                yield Problem(f"{key}.{name}", named[name], f"is no source; data.sources has {', '.join(sorted(known))}")


def stages_take_documents(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    for index, stage in enumerate(config.curriculum.stages):
        if stage.max_document_tokens is not None and stage.max_document_tokens < stage.min_document_tokens:
            expected = f"must be at least min_document_tokens = {stage.min_document_tokens}, else the stage takes no document"
            yield Problem(f"curriculum.stages.{index}.max_document_tokens", stage.max_document_tokens, expected)
        if stage.temperature is not None and stage.shares is not None:
            yield Problem(f"curriculum.stages.{index}.temperature", stage.temperature, "has no say beside shares; leave out one of the two")


def source_names(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, source in enumerate(config.data.sources):
        if source.name in seen:
            expected = f"is the name of data.sources.{seen[source.name]} too; give each source a name of its own"
            yield Problem(f"data.sources.{index}.name", source.name, expected)
        seen.setdefault(source.name, index)


def tokenizer_path(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    kind, path = config.data.tokenizer.kind, config.data.tokenizer.path
    if kind == "file" and path is None:
        yield Problem("data.tokenizer.path", None, "kind: file needs the path of a Hugging Face tokenizer.json")
    if kind == "train_bpe" and path is not None:
        yield Problem("data.tokenizer.path", path, "kind: train_bpe takes none; leave out the kind, or the path")


def stages_ascend(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    stages = config.curriculum.stages
    for index in range(1, len(stages)):
        if stages[index].until_step <= stages[index - 1].until_step:
            expected = f"must be above the stage before it, which ends at {stages[index - 1].until_step}"
            yield Problem(f"curriculum.stages.{index}.until_step", stages[index].until_step, expected)


def curriculum_covers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    stages, steps = config.curriculum.stages, config.run.steps
    if stages[-1].until_step < steps:
        expected = f"the last stage must reach run.steps = {steps}; raise it or add a stage"
        yield Problem(f"curriculum.stages.{len(stages) - 1}.until_step", stages[-1].until_step, expected)


def warmup_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    warmup, steps = config.schedule.warmup_steps, config.run.steps
    if warmup >= steps:
        yield Problem("schedule.warmup_steps", warmup, f"must be below run.steps = {steps}, else the peak learning rate is never reached")


def vocabulary(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    size = config.model.vocab_size
    if config.data.tokenizer.kind == "train_bpe" and size < BYTES_AND_END:
        yield Problem("model.vocab_size", size, f"a trained byte-level tokenizer needs at least {BYTES_AND_END} tokens")


def filter_rules(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    for name in ("rules", "extra_rules"):
        for index, rule in enumerate(getattr(config.data.filters, name, ())):
            key = f"data.filters.{name}.{index}"
            if rule.min is None and rule.max is None:
                yield Problem(f"{key}.min", None, f"a rule on {rule.signal} needs min or max")
            elif rule.min is not None and rule.max is not None and rule.min > rule.max:
                yield Problem(f"{key}.min", rule.min, f"must be at most max = {rule.max:g}, else no document passes")


def rules_name_sources(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    known = {source.name for source in config.data.sources}
    for name in ("rules", "extra_rules"):
        for index, rule in enumerate(getattr(config.data.filters, name, ())):
            if unknown := sorted({*(rule.sources or ())} - known):
                expected = f"{', '.join(unknown)}: no source; data.sources has {', '.join(sorted(known))}"
                yield Problem(f"data.filters.{name}.{index}.sources", list(rule.sources), expected)


def perplexity_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    perplexity = config.data.perplexity
    needed = {"path": perplexity.backend in ("kenlm", "checkpoint"), "tokenizer_path": perplexity.backend == "checkpoint"}
    for name, wanted in needed.items():
        value = getattr(perplexity, name)
        if wanted != (value is not None):
            told = "is needed" if wanted else "has no use"
            yield Problem(f"data.perplexity.{name}", value, f"{told} with backend: {perplexity.backend}")
    low, high = perplexity.quantiles
    if not 0 < low < high < 1:
        expected = "expected two shares between 0 and 1, the first below the second"
        yield Problem("data.perplexity.quantiles", list(perplexity.quantiles), expected)


def bands(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    for name in ("load_balance", "z_loss", "regret"):
        objective = getattr(config.objectives, name, None)  # absent if the schema refused the section
        band = getattr(objective, "band", None)
        if band and band[0] >= band[1]:
            yield Problem(f"objectives.{name}.band", list(band), "expected [low, high] with low below high")


def averaged_weights(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.evaluation.weights == "ema" and config.checkpoint.ema_decay is None:
        yield Problem("evaluation.weights", "ema", "no average is kept; set checkpoint.ema_decay, such as 0.999, or write live")


RULES: tuple[Rule, ...] = (
    head_width,
    kv_heads,
    latent_attention,
    yarn_bounds,
    stages_yarn_bounds,
    stages_stretch_enough,
    experts_per_token,
    expert_groups,
    dense_layers,
    engine_fits,
    deepspeed_fits,
    batch_division,
    source_names,
    mixture_names,
    tokenizer_path,
    stages_ascend,
    stages_take_documents,
    curriculum_covers,
    warmup_fits,
    vocabulary,
    filter_rules,
    rules_name_sources,
    perplexity_fits,
    bands,
    averaged_weights,
)
