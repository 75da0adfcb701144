"""Data that is not for training is refused by the builder; what is built says who may read it."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from refractor_core.data import Dataset, build
from refractor_core.data.inspect import describe_dataset
from refractor_core.data.manifest import Manifest
from refractor_core.data.validate import validate
from tests.data.corpora import run_config, words, write_corpus


@pytest.mark.parametrize("access", ["eval-only", "restricted"])
def test_data_that_is_not_for_training_is_refused(tmp_path: Path, access: str) -> None:
    sources = write_corpus(tmp_path / "corpus")
    sources[1]["access"] = access
    with pytest.raises(ValueError, match=rf"data\.sources\.1\.access = '{access}' \(source 'web'\)"):
        build(run_config(tmp_path / "dataset", sources))
    assert not (tmp_path / "dataset").exists()


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
    assert any("not for training, of web" in finding for finding in findings)
