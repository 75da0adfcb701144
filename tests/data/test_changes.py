"""A document that is masked, or loses a paragraph, is told of, and is nowhere counted among those that were removed."""

from pathlib import Path

import pytest

from refractor_core.cli.data import SAMPLES
from refractor_core.config import RunConfig
from refractor_core.data import Dataset, build
from refractor_core.data.audit import CHANGES
from refractor_core.data.charts import funnel_chart, rule_groups, source_rows
from refractor_core.data.inspect import describe_funnel, describe_removed
from refractor_core.data.report import write_report
from refractor_core.data.summary import Audit, funnel
from tests.data.corpora import PLAIN_RULES, run_config, words, write_jsonl

NOTICE = "This page may be copied and changed by anybody who keeps this notice, and who tells those that read it where it came from."
NUMBERS = range(12)
MASKED = (3, 5)
"""Documents with an address each, and both with the notice."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, RunConfig]:
    """Twelve pages, of which all but the first lose the notice and two are masked; one that is too short."""
    folder = tmp_path_factory.mktemp("changes")
    pages = [f"{words(number, 90)} {'ann@example.com bob@example.com' * (number in MASKED)}\n\n{NOTICE}\n\nend" for number in NUMBERS]
    write_jsonl(folder / "web.jsonl", [*pages, "short"])
    source = {"name": "web", "kind": "jsonl", "path": str(folder / "web.jsonl")}
    config = run_config(folder / "dataset", [source], data__filters={"rules": PLAIN_RULES, "mask": ["emails"]})
    return build(config), config


def test_every_change_has_its_row_and_its_document(built: tuple[Dataset, RunConfig]) -> None:
    dataset, _ = built
    rows, documents = dataset.audit().to_pylist(), {row["id"]: row for row in dataset.documents().to_pylist()}
    masked, cut = ({row["document"] for row in rows if row["stage"] == stage} for stage in ("mask", "paragraph"))
    assert len(masked) == len(MASKED) and len(cut) == len(NUMBERS) - 1 and masked & cut
    for id, row in documents.items():
        assert row["changed"] == ",".join(["mask"] * (id in masked) + ["paragraph"] * (id in cut))
    assert {row["value"] for row in rows if row["stage"] == "mask"} == {2.0}
    assert [row["stage"] for row in rows if row["stage"] not in CHANGES] == ["filter"]
    assert len(documents) == len(NUMBERS) and masked | cut <= set(documents)


def test_no_change_is_counted_as_a_removal(built: tuple[Dataset, RunConfig]) -> None:
    dataset, _ = built
    (source,) = dataset.manifest.sources
    assert source.removed == {"filter": 1} and source.read == len(NUMBERS) + 1
    audit = Audit.of(dataset)
    rows = {row["stage"]: row for row in funnel(dataset, audit)}
    assert {stage: row["removed_documents"] for stage, row in rows.items() if row["removed_documents"]} == {"filter": 1}
    changed = {"mask": len(MASKED), "paragraph": len(NUMBERS) - 1}
    assert {stage: row["changed_documents"] for stage, row in rows.items() if row["changed_documents"]} == changed
    assert {stage: row["documents"] for stage, row in rows.items()} == dict.fromkeys(rows, len(NUMBERS)) | {"found": len(NUMBERS) + 1}


def test_the_report_says_so_too(built: tuple[Dataset, RunConfig]) -> None:
    dataset, config = built
    audit = Audit.of(dataset)
    assert {row["stage"]: row["gone"] for row in funnel_chart(dataset, audit) if row["gone"]} == {"filter": 1}
    sources = source_rows(dataset, audit)
    assert sources["stages"] == ["filter"] and sources["rows"][0]["removed"] == [1]
    assert {group["stage"]: group["stays"] for group in rule_groups(audit)} == {"filter": False, "mask": True, "paragraph": True}
    assert "7.7% of what was read" in " ".join(write_report(dataset, config, []).read_text(encoding="utf-8").split())


def test_what_a_document_lost_before_it_went_is_counted_once(tmp_path: Path) -> None:
    pages = [f"{NOTICE}\n\n{words(100 + number, 90)}" for number in NUMBERS]
    write_jsonl(tmp_path / "web.jsonl", pages)
    source = {"name": "web", "kind": "jsonl", "path": str(tmp_path / "web.jsonl")}
    scored = {"backend": "checkpoint", "path": "x", "tokenizer_path": "x", "min_documents": 12, "keep": ["head", "middle"]}
    dataset = build(run_config(tmp_path / "dataset", [source], data__perplexity=scored), scorer=lambda texts: list(map(len, texts)))
    rows = {row["stage"]: row for row in funnel(dataset, Audit.of(dataset))}
    assert rows["paragraph"]["changed_documents"] == 11 and rows["perplexity"]["removed_documents"] > 1
    assert rows["found"]["bytes"] == sum(len(page.encode()) for page in pages)
    gone = [row for row in dataset.audit().to_pylist() if row["stage"] == "perplexity"]
    assert sum(not row["detail"].startswith(NOTICE[:20]) for row in gone) >= len(gone) - 1, "all but the first have lost it"


def test_inspect_lists_them_apart(built: tuple[Dataset, RunConfig]) -> None:
    dataset, _ = built
    removed, _, stay = describe_removed(dataset, SAMPLES).partition("documents that stay")
    assert "filter / min_characters: 1 (web 1)" in removed and "mask" not in removed and "paragraph" not in removed
    assert "mask / emails: 2 (web 2)" in stay and "paragraph / repeated: 11 (web 11)" in stay and "filter" not in stay
    lines = [line.split() for line in describe_funnel(dataset).splitlines()]
    assert {line[1]: (line[5], line[7]) for line in lines if line[1] in CHANGES} == {"mask": ("0", "2"), "paragraph": ("0", "11")}
