"""Data that is not for training is refused by the builder; what is built says who may read it."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from refractor_core.data import Dataset, build, pipeline
from refractor_core.data.inspect import describe_dataset
from refractor_core.data.manifest import Manifest
from refractor_core.data.validate import validate
from tests.data.corpora import run_config, words, write_corpus


def test_evaluation_data_is_refused(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "corpus")
    sources[1]["access"] = "eval-only"
    with pytest.raises(ValueError, match=r"data\.sources\.1\.access = 'eval-only' \(source 'web'\)"):
        build(run_config(tmp_path / "dataset", sources))
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("change", [{"access": "restricted"}, {"readers": ["group:med"]}])
def test_restricted_data_names_its_readers(tmp_path: Path, change: dict) -> None:
    sources = write_corpus(tmp_path / "corpus")
    sources[1] |= change
    with pytest.raises(ValueError, match="access: restricted and readers belong together"):
        run_config(tmp_path / "dataset", sources)


def test_restricted_data_is_recorded_and_closed_to_others(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "corpus")
    sources[1] |= {"access": "restricted", "readers": ["group:med", "ann"]}
    config = run_config(tmp_path / "dataset", sources)
    dataset = build(config)
    assert [source.readers for source in dataset.manifest.sources] == [(), ("group:med", "ann")]
    assert {(row["source"], row["access"]) for row in dataset.documents().to_pylist()} == {("books", "train"), ("web", "restricted")}
    assert dataset.path.stat().st_mode & 0o007 == 0 and validate(dataset, config) == []
    assert "web: restricted to group:med, ann" in describe_dataset(dataset, config)
    forgotten = dataset.manifest.model_copy(
        update={"sources": tuple(source.model_copy(update={"readers": ()}) for source in dataset.manifest.sources)}
    )
    findings = validate(Dataset(dataset.path, forgotten, "0" * 64), config)
    assert findings == ["manifest: source 'web' is restricted, not for training"]


def test_what_a_build_leaves_half_done_is_closed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = write_corpus(tmp_path / "corpus")
    sources[1] |= {"access": "restricted", "readers": ["ann"]}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(run_config(tmp_path / "dataset", sources))
    assert (tmp_path / ".dataset.work").stat().st_mode & 0o007 == 0


def test_access_and_address_are_recorded(tmp_path: Path) -> None:
    rows = {"text": [words(seed, 100) for seed in range(20)], "link": [f"https://x/{seed}" for seed in range(20)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    source = {"name": "tables", "kind": "parquet", "path": str(tmp_path / "t.parquet"), "url_key": "link"}
    config = run_config(tmp_path / "dataset", [source])
    dataset = build(config)
    assert dataset.manifest.sources[0].access == "train"
    found = dataset.documents().to_pylist()
    assert {row["access"] for row in found} == {"train"}
    assert {row["url"] for row in found} == set(rows["link"]) and validate(dataset, config, full=True) == []
    assert "train" in describe_dataset(dataset, config).splitlines()[2]


def test_a_dataset_that_holds_other_data_is_found_out(copy) -> None:
    folder, config = copy
    table = pyarrow.parquet.read_table(folder / "documents.parquet")
    marked = ["restricted" if source == "web" else "train" for source in table["source"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("access"), "access", pyarrow.array(marked))
    pyarrow.parquet.write_table(table, folder / "documents.parquet")
    findings = validate(Dataset(folder, Manifest.read(folder), "0" * 64), config)
    assert any("access is not what the manifest says, of web" in finding for finding in findings)
