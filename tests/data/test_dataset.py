"""Opening and validating name what is wrong: every damage that is planted is found."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from refractor_core.cli.main import main
from refractor_core.config import RunConfig
from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.manifest import differences
from refractor_core.data.validate import quick, validate


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


FILES = [
    "tokenizer.json",
    "documents.parquet",
    "audit.parquet",
    "inputs.parquet",
    "unigram.npy",
    "train/books.bin",
    "train/books.idx",
    "heldout/web.bin",
    "heldout/web.idx",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_short_or_flipped_file_is_named(copy: tuple[Path, RunConfig], name: str) -> None:
    folder, _ = copy
    content = (folder / name).read_bytes()
    flip(folder / name)
    Dataset.open(folder)
    with pytest.raises(ValueError, match=rf"(?s){name}: SHA-256 .* but the manifest says .*refractor data build"):
        Dataset.open(folder, verify=True)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"(?s){name}: {len(content) - 1} bytes, but the manifest says {len(content)}"):
        Dataset.open(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"(?s){name}: missing.*refractor data build"):
        Dataset.open(folder)


def test_every_file_of_a_dataset_is_in_its_manifest(built: tuple[Dataset, RunConfig]) -> None:
    dataset = built[0]
    on_disk = {path.relative_to(dataset.path).as_posix() for path in dataset.path.rglob("*") if path.is_file()}
    on_disk = {name for name in on_disk if not name.startswith("report/")}  # what is only told of it
    assert on_disk == {*dataset.manifest.files, "manifest.json"} and set(FILES) <= on_disk


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no dataset"),
        ("{", "not JSON"),
        ("[]", "schema version None, expected 1"),
        ('{"schema_version": 2}', "schema version 2, expected 1"),
        ('{"schema_version": 1}', "code_version"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(copy: tuple[Path, RunConfig], content: str | None, message: str) -> None:
    folder, _ = copy
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s){message}.*refractor data build"):
        Dataset.open(folder)


def test_differences_name_keys_and_values() -> None:
    assert differences({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "d": 5}) == [
        "a.1.b: the dataset was built with 2, the configuration says 4",
        "c: the dataset was built with 3, the configuration says None",
        "d: the dataset was built with None, the configuration says 5",
    ]


def test_another_configuration_is_told_apart(built: tuple[Dataset, RunConfig]) -> None:
    dataset, config = built
    assert dataset.check_config(config) == []
    model = config.model.model_copy(update={"vocab_size": 301})
    other = config.model_copy(update={"model": model})
    expected = ["model.vocab_size: the dataset was built with 300, the configuration says 301"]
    assert dataset.check_config(other) == expected
    assert validate(dataset, other) == expected


def edit_store(folder: Path, name: str, change) -> None:
    tokens = np.fromfile(folder / f"{name}.bin", np.uint16)
    change(tokens)
    tokens.tofile(folder / f"{name}.bin")


def edit_rows(folder: Path, change) -> None:
    table = pyarrow.parquet.read_table(folder / "documents.parquet")
    rows = table.to_pylist()
    change(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), folder / "documents.parquet")


def test_a_token_outside_the_vocabulary_is_found(copy: tuple[Path, RunConfig]) -> None:
    edit_store(copy[0], "heldout/web", lambda tokens: tokens.__setitem__(5, 300))
    findings = findings_of(copy)
    assert "heldout/web.bin: token 5 is 300, outside the vocabulary of 300" in findings


def findings_of(copy: tuple[Path, RunConfig], full: bool = False, check=validate) -> list[str]:
    """Findings in a dataset whose damage the hashes are not asked about."""
    folder, config = copy
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry["size"] = (folder / name).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return check(Dataset.open(folder), config, **({"full": True} if full else {}))


def swap(tokens: np.ndarray) -> None:
    tokens[[3, 4]] = tokens[[4, 3]] if tokens[3] != tokens[4] else tokens[[4, 3]] + 1


@pytest.mark.parametrize(
    ("change", "full", "message"),
    [
        (lambda folder: edit_store(folder, "train/web", lambda tokens: tokens.__setitem__(9, 0)), False, "train/web: documents do not end"),
        (
            lambda folder: edit_store(folder, "train/web", lambda tokens: tokens.__setitem__(-1, 9)),
            False,
            "train/web: documents do not end",
        ),
        (lambda folder: edit_store(folder, "train/web", lambda tokens: tokens.__setitem__(9, tokens[9] + 1)), False, "unigram.npy: is not"),
        (lambda folder: edit_store(folder, "train/web", swap), True, "does not decode to its text"),
        (lambda folder: edit_rows(folder, lambda rows: rows.pop(3)), False, "rows tell of them"),
        (lambda folder: edit_rows(folder, lambda rows: rows[2].update(tokens=1)), False, "token counts of train/books are not"),
        (lambda folder: edit_rows(folder, lambda rows: rows[2].update(license=None)), False, "license is missing in 1 rows"),
        (lambda folder: edit_rows(folder, lambda rows: rows[2].update(sha256=rows[-1]["sha256"])), False, "in both splits by sha256"),
        (lambda folder: edit_rows(folder, lambda rows: rows[2].update(id=rows[-1]["id"])), False, "in both splits by id"),
        (lambda folder: edit_rows(folder, lambda rows: rows[2].update(id=rows[3]["id"])), False, "some ids occur twice"),
    ],
)
def test_validation_finds_what_is_planted(copy: tuple[Path, RunConfig], change, full: bool, message: str) -> None:
    assert findings_of(copy, full=True) == []
    change(copy[0])
    assert any(message in finding for finding in findings_of(copy, full=full))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: edit_rows(folder, lambda rows: rows.pop(3)), "the stores have 50 documents, 49 rows tell of them"),
        (lambda folder: edit_manifest(folder, lambda manifest: manifest["sources"][1]["train"].update(tokens=1)), "the manifest says "),
        (lambda folder: edit_manifest(folder, lambda manifest: manifest.update(dtype="int32")), "holds uint16, the manifest says int32"),
        (lambda folder: edit_manifest(folder, lambda manifest: manifest["sources"][1].update(access="eval-only")), "'web' is eval-only"),
        (lambda folder: retyped(folder, "tokens"), "the columns tokens are of another type"),
    ],
)
def test_the_quick_check_finds_what_costs_no_pass_over_the_data(copy: tuple[Path, RunConfig], change, message: str) -> None:
    assert quick(Dataset.open(copy[0]), copy[1]) == []
    change(copy[0])
    assert any(message in finding for finding in findings_of(copy, check=quick))


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def retyped(folder: Path, name: str) -> None:
    table = pyarrow.parquet.read_table(folder / "documents.parquet")
    place = table.schema.get_field_index(name)
    pyarrow.parquet.write_table(table.set_column(place, name, table[name].cast(pyarrow.float64())), folder / "documents.parquet")


def test_a_missing_column_is_found(copy: tuple[Path, RunConfig]) -> None:
    table = pyarrow.parquet.read_table(copy[0] / "documents.parquet").drop_columns(["license"])
    pyarrow.parquet.write_table(table, copy[0] / "documents.parquet")
    assert "documents.parquet: lacks the columns license" in findings_of(copy)


def test_a_mix_off_its_target_is_found(built: tuple[Dataset, RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = BatchPlan.describe

    def skewed(self: BatchPlan) -> list[dict]:
        stages = honest(self)
        stages[0]["sources"]["books"]["sequences"] += 2
        return stages

    monkeypatch.setattr(BatchPlan, "describe", skewed)
    assert any("curriculum.stages.0: books gets" in finding for finding in validate(*built))


def test_a_curriculum_that_the_dataset_is_too_small_for_is_found(built: tuple[Dataset, RunConfig]) -> None:
    dataset, config = built
    curriculum = config.curriculum.model_validate({"stages": [{"until_step": 10, "sequence_length": 10**6}]})
    (finding,) = validate(dataset, config.model_copy(update={"curriculum": curriculum}))
    assert "curriculum.stages.0.sequence_length = 1000000: source 'books'" in finding


@pytest.fixture
def document(copy: tuple[Path, RunConfig], tmp_path: Path) -> Path:
    """The copy's configuration as a file."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(copy[1].model_dump(mode="json")))
    return path


def test_the_command_builds_once_and_validates(document: Path, copy: tuple[Path, RunConfig], capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "build", str(document)]) == 0
    assert "already built" in capsys.readouterr().err
    assert main(["data", "build", str(document), "data.heldout_share=0.2"]) == 1
    assert "holds a dataset of another configuration" in capsys.readouterr().err
    assert main(["data", "validate", str(document), "--full"]) == 0
    assert "sound" in capsys.readouterr().out
    edit_rows(copy[0], lambda rows: rows.pop(3))
    assert main(["data", "validate", str(document)]) == 1
    assert "documents.parquet" in capsys.readouterr().err


def test_validate_lists_findings_and_exits_with_1(document: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "validate", str(document), "model.vocab_size=400"]) == 1
    captured = capsys.readouterr()
    assert "built with 300, the configuration says 400" in captured.err and "1 findings" in captured.out


def test_the_command_builds_anew_by_force(document: Path, copy: tuple[Path, RunConfig]) -> None:
    before = (copy[0] / "manifest.json").read_bytes()
    (copy[0] / "train" / "web.bin").unlink()
    assert main(["data", "build", str(document)]) == 1
    assert main(["data", "build", str(document), "--force"]) == 0
    assert (copy[0] / "manifest.json").read_bytes() == before


def test_inspect_shows_sources_stages_removals_documents_and_batches(
    document: Path, copy: tuple[Path, RunConfig], capsys: pytest.CaptureFixture
) -> None:
    row = pyarrow.parquet.read_table(copy[0] / "documents.parquet").to_pylist()[0]
    expected = {
        (): ["books", "web", "stage 0: steps 0 to 9, 60 sequences of 16, 6 a step"],
        ("--removed",): ["nothing was removed"],
        ("--document", row["id"]): [row["path"], "public-domain"],
        ("--batch", "3"): ["step 3: 6 sequences of 16"],
    }
    for options, texts in expected.items():
        assert main(["data", "inspect", str(document), *options]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in texts), shown
    assert main(["data", "inspect", str(document), "--document", "nobody"]) == 1
    assert main(["data", "inspect", str(document), "--batch", "99"]) == 1


def test_a_missing_dataset_says_how_to_get_one(document: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "validate", str(document), f"data.dir={tmp_path}/nowhere"]) == 1
    assert "holds no dataset" in capsys.readouterr().err


def test_a_file_in_place_of_the_dataset_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(ValueError, match="holds no dataset.*refractor data build"):
        Dataset.open(tmp_path / "data")


def test_verifying_some_files_passes_over_the_others(copy: tuple[Path, RunConfig]) -> None:
    flip(copy[0] / "heldout/web.bin")
    dataset = Dataset.open(copy[0])
    dataset.verify("train/", "unigram.npy")
    for beginnings in (("heldout/",), ("train/", "heldout/"), ()):
        with pytest.raises(ValueError, match="heldout/web.bin: SHA-256"):
            dataset.verify(*beginnings)


def test_a_table_that_cannot_be_read_is_named(copy: tuple[Path, RunConfig]) -> None:
    for name, read in (("documents.parquet", Dataset.documents), ("audit.parquet", Dataset.audit)):
        (copy[0] / name).write_bytes(b"x" * (copy[0] / name).stat().st_size)
        with pytest.raises(ValueError, match=f"{name}: cannot be read .*refractor data build"):
            read(Dataset.open(copy[0]))


def test_a_token_outside_the_vocabulary_stops_the_batch_that_reads_it(copy: tuple[Path, RunConfig]) -> None:
    edit_store(copy[0], "train/books", lambda tokens: tokens.fill(299))
    BatchPlan(Dataset.open(copy[0]), copy[1]).batch(0)
    edit_store(copy[0], "train/books", lambda tokens: tokens.fill(300))
    with pytest.raises(ValueError, match=r"train/books.bin: holds token 300, outside the vocabulary of 300; .*refractor data build"):
        BatchPlan(Dataset.open(copy[0]), copy[1]).batch(0)
