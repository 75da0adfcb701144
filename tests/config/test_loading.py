"""A document is read whole: composition, overrides, where each value came from, and every mistake at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from refractor_core.config import ConfigError, RunConfig, config_sha, dump, load_document, load_run
from refractor_core.config.schema import walk

Write = Callable[..., Path]


def mistakes(path: Path, overrides: tuple[str, ...] = (), **options: int) -> dict[str, tuple[str, object, str]]:
    """key → (where, value, expected) of every mistake found."""
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides, **options)
    found = {}
    for problem in caught.value.problems:
        assert problem.key not in found, "a key is reported twice"
        assert str(problem) in str(caught.value)
        found[problem.key] = (problem.where.replace(f"{path.parent}/", ""), problem.value, problem.expected)
    return found


# ---- composition


def test_later_files_win_over_earlier_and_own_keys_over_all(write: Write) -> None:
    write("a: {x: 1, y: 1, z: 1}\nlist: [1, 2, 3]\nonly: a\n", "base/a.yaml")
    write("extends: a.yaml\na: {y: 2, z: 2}\n", "base/b.yaml")
    document = load_document(write("extends: [base/a.yaml, base/b.yaml]\na:\n  z: 3\nlist: [4]\n"))
    assert document.plain() == {"a": {"x": 1, "y": 2, "z": 3}, "list": [4], "only": "a"}


def test_defaults_is_a_synonym_and_sections_extend_relative_to_their_file(write: Write) -> None:
    write("num_layers: 4\nhidden_size: 64\nmoe: {top_k: 2}\n", "models/m.yaml")
    write("model: {defaults: [../models/m.yaml], num_layers: 8}\n", "runs/base.yaml")
    document = load_document(write("extends: runs/base.yaml\nmodel: {moe: null}\n"))
    assert document.plain() == {"model": {"num_layers": 8, "hidden_size": 64, "moe": None}}
    assert {key: document.where(key).rpartition("/")[2] for key in ("model.num_layers", "model.hidden_size", "model.moe")} == {
        "model.num_layers": "base.yaml:1",
        "model.hidden_size": "m.yaml:2",
        "model.moe": "run.yaml:2",
    }
    assert document.where("model.head_dim") == ""


def test_a_list_item_may_extend(write: Write) -> None:
    write("kind: text\npath: a\n", "source.yaml")
    assert load_document(write("sources:\n  - {extends: source.yaml, path: b}\n")).plain() == {"sources": [{"kind": "text", "path": "b"}]}


def test_circles_are_refused_with_the_chain(write: Write) -> None:
    write("extends: run.yaml\n", "b.yaml")
    (problem,) = mistakes(write("extends: b.yaml\n")).values()
    assert problem[0] == "b.yaml:1" and "run.yaml → " in problem[2] and "b.yaml → " in problem[2]
    (problem,) = mistakes(write("model: {extends: run.yaml}\n")).values()
    assert "circle" in problem[2]


def test_a_file_extended_twice_on_different_ways_is_no_circle(write: Write) -> None:
    write("x: 1\n", "a.yaml")
    write("extends: a.yaml\ny: 1\n", "b.yaml")
    assert load_document(write("extends: [a.yaml, b.yaml]\n")).plain() == {"x": 1, "y": 1}


@pytest.mark.parametrize("content", ["extends: 3\n", "extends: ''\n", "extends: [[a.yaml]]\n", "extends: null\n"])
def test_extends_takes_paths(write: Write, content: str) -> None:
    assert "path of a YAML file" in mistakes(write(content))["extends"][2]


@pytest.mark.parametrize("content", [None, b"[1]\n", b"a: [\n", b"\xff\xfe\x00"], ids=["absent", "list", "broken", "binary"])
def test_an_extended_file_that_is_no_map_is_one_mistake_and_not_a_storm(write: Write, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "base.yaml").write_bytes(content)
    found = mistakes(write({"extends": "base.yaml", "run": {"steps": "x"}}))
    assert len(found) == 2 and "run.steps" in found


@pytest.mark.parametrize("content", ["", "# nothing\n", "null\n"])
def test_an_empty_document_lacks_every_required_section(write: Write, content: str) -> None:
    assert set(mistakes(write(content))) == {"run", "model", "batch", "data", "curriculum", "optimizer", "schedule"}


# ---- overrides


def test_overrides_win_and_reach_lists_null_and_absent_sections(write: Write, sound: dict) -> None:
    sound["model"]["moe"] = None
    config = load_run(
        write(sound),
        [
            "model.moe.num_experts=4",
            "model.moe.top_k=1",
            "model.moe={expert_hidden_size: 16}",
            "model.rope.scaling.factor=2",
            "model.rope.scaling.original_context=64",
            "data.sources.1.path=other/*.txt",
            "optimizer.learning_rate=1e-4",
            "run.name=first",
            "run.name=second",
            "checkpoint.ema_decay=",
        ],
    )
    assert config.model.moe.model_dump(include={"num_experts", "top_k", "expert_hidden_size"}) == {
        "num_experts": 4,
        "top_k": 1,
        "expert_hidden_size": 16,
    }
    assert config.model.rope.scaling.factor == 2.0
    assert config.data.sources[1].path == "other/*.txt" and config.data.sources[0].name == "code"
    assert (config.optimizer.learning_rate, config.run.name, config.checkpoint.ema_decay) == (1e-4, "second", None)


def test_an_override_may_extend_relative_to_the_working_directory(write: Write, sound: dict, tmp_path: Path) -> None:
    write("num_experts: 16\n", "moe.yaml")
    assert load_run(write(sound), [f"model.moe={{extends: {tmp_path}/moe.yaml}}"]).model.moe.num_experts == 16


def test_overrides_without_a_place_are_refused(write: Write, sound: dict) -> None:
    overrides = ("steps", "=3", "run..x=1", "run.steps.x=2", "data.sources.2.name=x", "data.sources.name=x", "run.dir=[1")
    found = mistakes(write(sound), overrides)
    assert found.keys() == {"steps", "override", "run..x", "run.steps.x", "data.sources.2.name", "data.sources.name", "run.dir"}
    assert all(where == "override" for where, _, _ in found.values())


# ---- mistakes


def test_all_mistakes_are_found_at_once_with_file_line_value_and_mend(write: Write, sound: dict) -> None:
    write(sound, "base.yaml")
    path = write(
        """extends: base.yaml
run: {steps: 40.0, naem: x}
model:
  tie_embeddings: no
  hidden_size: "64"
  top_k: 3
  moe:
    top_k: 12
    first_dense_layers: 9
modle: {}
parallel: {tensor: 2}
data:
  sources:
    - {kind: text, name: a}
    - {kind: txt, name: b}
    - {kind: jsonl, name: "no spaces", path: p}
objectives: {z_loss: {band: [1]}, regret: {band: [2, 1]}}
optimizer: null
""",
        "run.yaml",
    )
    found = mistakes(path, ("kernels=trch", "batch.global_batch_size=7"), world_size=2)
    expected = {
        "run.steps": ("run.yaml:2", 40.0, "a whole number above 0; write 40"),
        "run.naem": ("run.yaml:2", "x", "did you mean name?"),
        "model.tie_embeddings": ("run.yaml:4", "no", "true or false; write false"),
        "model.hidden_size": ("run.yaml:5", "64", "write 64 without quotes"),
        "model.top_k": ("run.yaml:6", 3, "did you mean model.moe.top_k?"),
        "model.moe.top_k": ("run.yaml:8", 12, "at most model.moe.num_experts = 8"),
        "model.moe.first_dense_layers": ("run.yaml:9", 9, "at most model.num_layers = 2"),
        "modle": ("run.yaml:10", {}, "did you mean model?"),
        "data.sources.0.path": ("run.yaml:14", None, "is missing; expected text"),
        "data.sources.1": ("run.yaml:15", {"kind": "txt", "name": "b"}, "jsonl, megatron, olmo, parquet, python_stdlib, text"),
        "data.sources.2.name": ("run.yaml:16", "no spaces", "text that matches"),
        "objectives.z_loss.band": ("run.yaml:17", [1], "a list of 2 items"),
        "objectives.regret.band": ("run.yaml:17", [2.0, 1.0], "low below high"),
        "optimizer": ("run.yaml:18", None, "a section with the keys kind, learning_rate"),
        "kernels": ("override", "trch", "did you mean torch?"),
        "batch.global_batch_size": ("override", 7, "2 × 1; the nearest is 8"),
    }
    assert found.keys() == expected.keys()
    for key, (where, value, words) in expected.items():
        assert found[key][:2] == (where, value)
        assert words in found[key][2], found[key]


def test_missing_keys_say_where_they_belong_and_what_they_take(write: Write, sound: dict) -> None:
    del sound["run"]["steps"], sound["schedule"], sound["curriculum"]["stages"]
    found = mistakes(write(sound))
    assert found["run.steps"] == ("run.yaml:1", None, "is missing; expected a whole number above 0")
    assert found["schedule"][2] == "is missing; expected a section with at least warmup_steps, decay_steps"
    assert found["curriculum.stages"][2] == "is missing; expected a list of sections, each with until_step, sequence_length"


WRONG = {
    "run.name=a b": "matches",
    "run.name=3": "text",
    "run.seed=-1": "a whole number at least 0",
    "run.threads=x": "a whole number above 0, or null",
    "run.device=cdua": "did you mean cuda?",
    "run.steps=abc": "a whole number above 0",
    "parallel.data_shard=0": "a whole number above 0, or auto",
    "parallel.data_shard=atuo": "did you mean auto?",
    "optimizer.beta1=1": "a number at least 0 and below 1",
    "optimizer.learning_rate=true": "a number above 0",
    "schedule.tail_exponent=0.5": "a number above 0.5 and at most 1",
    "run.steps=true": "a whole number above 0",
    "batch.micro_batch_size=1_000": "write 1000 without quotes",
    "data.sources=[]": "a list of at least 1",
    "data.sources={}": "a list of at least 1",
    "data.tokenizer.kind=bpe": "did you mean train_bpe?",
    "model.attention=gqa": "a section with the keys kind, qk_norm",
    "objectives.regret.band=[0, x]": "a list of 2 items, each a number",
    "objectives.regret.band=[0, 1, 2]": "a list of 2 items, each a number",
}


@pytest.mark.parametrize(("override", "words"), WRONG.items())
def test_wrong_values_are_told_in_words(write: Write, sound: dict, override: str, words: str) -> None:
    found = mistakes(write(sound), (override,))
    key = override.partition("=")[0]
    assert found.keys() == {key} and found[key][0] == "override"
    assert words in found[key][2] and ("did you mean" in found[key][2]) == ("did you mean" in words)


def test_types_are_not_coerced(write: Write, sound: dict) -> None:
    for override in ("run.seed='1'", "run.seed=1.0", "model.tie_embeddings=1", "model.norm_epsilon='1e-6'", "run.dir=7"):
        assert len(mistakes(write(sound), (override,))) == 1


# ---- round trip


def test_dump_loads_back_to_an_equal_config_with_the_same_hash(write: Write, sound: dict) -> None:
    awkward = ["run.name='1e-3'", "run.dir='no'", "data.sources.1.license='~x: y #z'", "optimizer.learning_rate=1e-05"]
    config = load_run(write(sound), awkward)
    again = load_run(write(dump(config), "again.yaml"))
    assert again == config and config_sha(again) == config_sha(config)
    assert config_sha(load_run(write(sound))) != config_sha(config)


def test_the_hash_does_not_depend_on_the_order_or_on_written_defaults(write: Write, sound: dict) -> None:
    turned = dict(reversed(sound.items())) | {"kernels": "auto"}
    assert config_sha(load_run(write(turned))) == config_sha(load_run(write(sound, "b.yaml")))


def test_configs_are_frozen(write: Write, sound: dict) -> None:
    config = load_run(write(sound))
    with pytest.raises(ValidationError):
        config.run.steps = 3


# ---- nothing but ConfigError

KEYS = sorted({part.removesuffix("[]") for path, _, _ in walk(RunConfig) for part in path} | {"extends", "kind", "x"})
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10)
    | st.floats(-2, 2)
    | st.sampled_from(["text", "jsonl", "gqa", "mla", "auto", "run.yaml", "", "no", "\x07"])
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5), max_leaves=12
)
changes = st.lists(st.tuples(st.sampled_from([".".join(path).replace("[]", ".0") for path, _, _ in walk(RunConfig)]), trees), max_size=4)


def test_a_section_with_an_unknown_key_may_break_its_own_rule_too(write: Write, sound: dict) -> None:
    """The rule is not asked while the key is there, and was when the rest of the document was looked at."""
    with pytest.raises(ConfigError) as told:
        load_run(write(sound), ["data.sources.0.path=x", "data.sources.0.readers=[text]", "run.steps=-1"])
    assert {problem.key for problem in told.value.problems} == {"data.sources.0.path", "run.steps"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(st.sampled_from(KEYS), trees, max_size=6) | trees, changes=changes)
def test_no_document_raises_anything_but_config_error(write: Write, sound: dict, tree: object, changes: list) -> None:
    from refractor_core.config.yaml12 import to_yaml

    documents = [to_yaml(tree), to_yaml(sound | tree) if isinstance(tree, dict) else to_yaml(sound)]
    for text in documents:
        try:
            load_run(write(text), [f"{key}={to_yaml(value)}" for key, value in changes])
        except ConfigError as error:
            assert error.problems and all(problem.key and problem.expected for problem in error.problems)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@#,? \n\t0123~"), max_size=40), override=st.text(max_size=12))
def test_no_text_raises_anything_but_config_error(write: Write, text: str, override: str) -> None:
    with pytest.raises(ConfigError):
        load_run(write(text), [override])
