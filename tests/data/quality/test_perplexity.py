"""Bands are quantiles within a group; what goes is told; a document is never scored by a model that has read it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refractor_core.config.quality import PerplexityConfig
from refractor_core.data import Dataset, build
from refractor_core.data.inspect import describe_funnel
from refractor_core.data.quality import perplexity
from refractor_core.data.quality.language import Identified
from refractor_core.data.quality.perplexity import cut
from refractor_core.data.summary import Audit, funnel
from tests.data.corpora import run_config, words, write_jsonl


@given(st.lists(st.floats(1, 100, width=32), min_size=1, max_size=60), st.data())
def test_bands_are_the_shares_asked_for(values: list[float], data: st.DataObject) -> None:
    scores = np.array(values, np.float32)
    groups = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(values), max_size=len(values))))
    scores[:1] = np.nan
    bands, cuts = cut(scores, groups, 3, PerplexityConfig(min_documents=3))
    for group in range(3):
        own = scores[(groups == group) & np.isfinite(scores)]
        assert (group in cuts) == (len(own) >= 3)
        if group in cuts:
            low, high = cuts[group]
            found = bands[(groups == group) & np.isfinite(scores)]
            assert (found == np.where(own <= low, 0, np.where(own <= high, 1, 2))).all()
            assert (own <= low).mean() >= 0.3 and (own < low).mean() < 0.3 + 1e-9 and (own <= high).mean() >= 0.6
    assert np.isnan(bands[(groups == -1) | np.isnan(scores)]).all()


def corpus(folder: Path, changes: dict) -> Dataset:
    """Sixty repetitive texts, twenty of random words, and a second domain too small for bands."""
    usual = [" ".join(f"the cat {a} sat on mat {b} ." for a in range(i, i + 40) for b in range(2)) for i in range(60)]
    write_jsonl(folder / "web.jsonl", usual + [words(number, 150) for number in range(20)])
    write_jsonl(folder / "few.jsonl", [words(100 + number, 150) for number in range(5)])
    sources = [{"name": name, "kind": "jsonl", "path": f"{folder}/{name}.jsonl", "domain": name} for name in ("web", "few")]
    plain = {"rules": [{"signal": "characters", "min": 1}], "mask": ["emails"]}
    off = {"threshold": 1.0}
    config = run_config(folder / "out", sources, data__filters=plain, data__deduplication=off, data__heldout_share=0.1)
    data = config.data.model_copy(update={"perplexity": PerplexityConfig(min_documents=20, **changes)})
    return build(config.model_copy(update={"data": data}))


def facts(dataset: Dataset) -> dict:
    return next(stage.facts for stage in dataset.manifest.stages if stage.name == "perplexity")["groups"]


def test_the_tail_goes_with_its_value_and_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refractor_core.data.screen.identify", lambda text: Identified("en", 1.0))
    whole = corpus(tmp_path / "a", {})
    rows = whole.documents().to_pylist()
    assert facts(whole)["en/web"]["documents"] == 80 and "en/few" not in facts(whole)
    assert {row["source"] for row in rows if np.isnan(row["perplexity"])} == {"few"}
    assert np.mean([row["perplexity_band"] for row in rows if row["source"] == "web" and row["bytes"] < 1000]) == 2
    cut_off = corpus(tmp_path / "b", {"keep": ("head", "middle")})
    found = [row for row in cut_off.audit().to_pylist() if row["stage"] == "perplexity"]
    threshold = facts(cut_off)["en/web"]["middle_up_to"]
    assert facts(cut_off) == facts(whole) and found
    assert {(row["rule"], row["threshold"]) for row in found} == {("tail", threshold)} and min(row["value"] for row in found) > threshold
    kept = {row["path"].rpartition("/")[2] for row in cut_off.documents().to_pylist()}
    gone = {row["path"].rpartition("/")[2] for row in found}
    assert not kept & gone and len(kept) + len(gone) == 85
    high = corpus(tmp_path / "c", {"max_value": threshold})
    assert {row["rule"] for row in high.audit().to_pylist()} == {"max_value"}
    rows = {(row["source"], row["stage"]): row for row in funnel(cut_off, Audit.of(cut_off))}
    assert rows["web", "found"]["documents"] == 80 and rows["web", "perplexity"]["removed_documents"] == len(gone)
    assert rows["web", "kept"]["documents"] == 80 - len(gone) == rows["web", "perplexity"]["documents"]
    assert rows["web", "found"]["bytes"] == sum(row["bytes"] for row in whole.documents().to_pylist() if row["source"] == "web")
    assert describe_funnel(cut_off).count("\n") == len(rows)


def test_no_document_is_scored_by_a_model_that_has_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that no other document has are new to the model, though every document is in the reference sample."""
    monkeypatch.setattr("refractor_core.data.screen.identify", lambda text: Identified("en", 1.0))
    texts = [" ".join(f"d{number}w{word}" for word in range(60)) for number in range(30)]
    write_jsonl(tmp_path / "web.jsonl", texts)
    sources = [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/web.jsonl"}]
    dataset = build(run_config(tmp_path / "out", sources, data__perplexity={"min_documents": 10}, data__heldout_share=0.1))
    assert facts(dataset)["en/text"]["reference_documents"] == 30
    assert min(row["perplexity"] for row in dataset.documents().to_pylist()) > 2**19


def test_a_scorer_is_asked_and_missing_backends_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_jsonl(folder / "web.jsonl", [words(number, 100 + number) for number in range(30)])
    sources = [{"name": "web", "kind": "jsonl", "path": f"{folder}/web.jsonl"}]
    given = {"backend": "checkpoint", "path": "m", "tokenizer_path": "t", "min_documents": 5, "keep": ["head"]}
    config = run_config(folder / "out", sources, data__perplexity=given, data__heldout_share=0.1)
    with pytest.raises(ValueError, match="needs a scorer"):
        build(config)
    dataset = build(config, scorer=lambda texts: [float(len(text)) for text in texts])
    rows = dataset.documents().to_pylist()
    assert all(row["perplexity"] == row["bytes"] and row["perplexity_band"] == 0 for row in rows) and len(rows) == 9
    assert json.dumps(facts(dataset))


def test_kenlm_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)
    write_jsonl(tmp_path / "web.jsonl", [words(number, 100) for number in range(5)])
    sources = [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/web.jsonl"}]
    with pytest.raises(ValueError, match="pip install kenlm"):
        build(run_config(tmp_path / "out", sources, data__perplexity={"backend": "kenlm", "path": "m"}))
    assert perplexity.BANDS == ("head", "middle", "tail")
