"""A build is whole or not at all, says where everything came from and went, and gives equal bytes for equal inputs."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, assembling, build, builder, pipeline, sources, tokenising
from refractor_core.data.manifest import CODE_VERSION
from refractor_core.data.parts import list_parts
from refractor_core.data.quality.language import identify
from refractor_core.data.stages import STAGES
from refractor_core.data.validate import validate
from tests.data.corpora import run_config, words, write_corpus, write_jsonl


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def one_source(folder: Path, texts: list[str], **changes) -> RunConfig:
    write_jsonl(folder / "web.jsonl", texts)
    source = {"name": "web", "kind": "jsonl", "path": str(folder / "web.jsonl")}
    return run_config(folder / "dataset", [source], data__heldout_share=0.2, **changes)


def test_every_token_has_a_document_and_every_document_its_origin(built: tuple[Dataset, RunConfig]) -> None:
    dataset, config = built
    rows = dataset.documents().to_pylist()
    assert len(rows) == 50
    for split, stores in (("train", dataset.train), ("heldout", dataset.heldout)):
        for source, store in zip(dataset.manifest.sources, stores):
            own = [row for row in rows if (row["split"], row["source"]) == (split, source.name)]
            assert [row["position"] for row in own] == list(range(store.documents))
            assert sum(row["tokens"] for row in own) == len(store.tokens) == getattr(source, split).tokens
            for row in own:
                tokens = store.document(row["position"])
                assert tokens[-1] == dataset.manifest.eos_id
                text = dataset.tokenizer.decode(tokens)
                assert len(text.encode()) == row["bytes"]
                assert row["sha256"] == hashlib.sha256(text.encode()).hexdigest() and row["language"] == identify(text.encode()).language
                name, _, line = row["path"].partition(".jsonl:")
                original = (
                    json.loads(Path(f"{name}.jsonl").read_text().splitlines()[int(line) - 1])["text"] if line else Path(name).read_text()
                )
                assert text == original
    assert {(row["source"], row["license"], row["domain"]) for row in rows} == {
        ("books", "public-domain", "prose"),
        ("web", "CC0-1.0", "web"),
    }
    wanted = {stage.name: stage.version for stage in STAGES if stage.wanted(config.data)}
    assert wanted and {"read": CODE_VERSION, **wanted, "tokenise": CODE_VERSION} == {
        stage.name: stage.version for stage in dataset.manifest.stages
    }
    assert validate(dataset, config, full=True) == []


def test_every_input_file_is_listed_with_its_hash(tmp_path: Path) -> None:
    sources = write_corpus_once(tmp_path)
    (tmp_path / "corpus" / "books" / "zz.txt").symlink_to(tmp_path / "nowhere")  # cannot be read
    config = run_config(tmp_path / "dataset", sources)
    before = build(config)
    hashes = before.documents()["sha256"].to_pylist()
    rows = pyarrow.parquet.read_table(tmp_path / "dataset" / "inputs.parquet").to_pylist()
    files = [*sorted((tmp_path / "corpus" / "books").iterdir()), tmp_path / "corpus" / "web.jsonl"]
    assert [row["path"] for row in rows] == [path.as_posix() for path in files] and rows[-1]["source"] == "web"
    for row, path in zip(rows, files):
        content = path.read_bytes() if path.exists() else None
        assert (row["bytes"], row["sha256"]) == (
            (None, None) if content is None else (len(content), hashlib.sha256(content).hexdigest())
        ), path
    with files[-1].open("a") as stream:
        stream.write("\n")  # the same documents, from another file
    after = build(config, force=True)
    assert after.documents()["sha256"].to_pylist() == hashes and after.sha256 != before.sha256


def test_unigram_counts_and_figures_are_those_of_the_tokens(built: tuple[Dataset, RunConfig]) -> None:
    dataset = built[0]
    tokens = np.concatenate([store.tokens for store in dataset.train])
    assert dataset.unigram_counts().tolist() == np.bincount(tokens, minlength=300).tolist()
    heldout = list(dataset.heldout_documents())
    assert len(heldout) == sum(source.heldout.documents for source in dataset.manifest.sources) > 1
    assert {document.domain for document in heldout} == {"prose", "web"}
    assert all(len(dataset.tokenizer.decode(document.tokens).encode()) == document.bytes for document in heldout)


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (run_config(tmp_path / name, write_corpus_once(tmp_path)) for name in ("one", "two"))
    build(first)
    build(second)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def write_corpus_once(folder: Path) -> list[dict]:
    """The corpus's sources; its files are written by the first call."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    return [
        {"name": "books", "kind": "text", "path": f"{folder}/corpus/books/*.txt", "domain": "prose"},
        {"name": "web", "kind": "jsonl", "path": f"{folder}/corpus/web.jsonl"},
    ]


def test_what_is_removed_has_a_row_that_says_why(tmp_path: Path) -> None:
    texts = [words(number, 200) for number in range(12)]
    near = texts[0].rsplit(" ", 2)[0] + " other end"
    (tmp_path / "books").mkdir()
    for number in range(6):
        (tmp_path / "books" / f"{number}.txt").write_text(texts[number])
    write_jsonl(tmp_path / "web.jsonl", [near, texts[1] + "\n", "short", *texts[6:]])
    with (tmp_path / "web.jsonl").open("a") as stream:
        stream.write("{broken\n")
    config = run_config(
        tmp_path / "dataset",
        [
            {"name": "books", "kind": "text", "path": f"{tmp_path}/books/*.txt"},
            {"name": "web", "kind": "jsonl", "path": f"{tmp_path}/web.jsonl"},
        ],
    )
    dataset = build(config)
    rows = {row["path"].rpartition(":")[2]: row for row in dataset.audit().to_pylist()}
    ids = {row["path"]: row["id"] for row in dataset.documents().to_pylist()}
    assert {line: (row["source"], row["stage"], row["rule"]) for line, row in rows.items()} == {
        "1": ("web", "near", "jaccard"),
        "2": ("web", "exact", "normal_form"),
        "3": ("web", "filter", "min_characters"),
        "10": ("web", "read", "invalid_json"),
    }
    assert rows["1"]["twin"] == ids[f"{tmp_path}/books/0.txt"] and rows["2"]["twin"] == ids[f"{tmp_path}/books/1.txt"]
    assert rows["1"]["value"] >= rows["1"]["threshold"] == 0.8
    assert (rows["3"]["value"], rows["3"]["threshold"], rows["3"]["detail"]) == (5, 200, "short")
    books, web = dataset.manifest.sources
    assert (books.read, books.removed) == (6, {})
    assert (web.read, web.removed) == (10, {"exact": 1, "filter": 1, "near": 1, "read": 1})
    kept = {row["document"] for row in dataset.audit().to_pylist()} & set(ids.values())
    assert not kept


def test_near_duplicates_stay_where_deduplication_is_off(tmp_path: Path) -> None:
    texts = [words(number, 200) for number in range(5)]
    config = one_source(tmp_path, [*texts, texts[0] + " end", texts[1]], data__deduplication={"enabled": False})
    assert {row["stage"] for row in build(config).audit().to_pylist()} == {"exact"}


def test_text_cannot_end_a_document(tmp_path: Path) -> None:
    config = one_source(tmp_path, [f"{words(number, 100)} <|endoftext|> {words(number + 50, 100)}" for number in range(10)])
    assert validate(build(config), config, full=True) == []


def test_a_built_dataset_is_returned_refused_or_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = one_source(tmp_path, [words(number, 100) for number in range(10)])
    before = build(config).sha256
    told = capsys.readouterr().err
    for stage in ("read", "compare", "paragraph-hashes", "shorten", "perplexity-scores", "tokenizer", "tokenise", "assemble"):
        assert re.search(rf"{stage} *: .*/s", told) and re.search(rf"{stage} *: .*MiB of 2 GiB|{stage} *: 0.00", told), stage
    assert re.search(r"tokenise *: 100%", told)
    assert build(config).sha256 == before
    assert "already built" in capsys.readouterr().err
    other = config.model_copy(update={"data": config.data.model_copy(update={"heldout_share": 0.3})})
    with pytest.raises(
        ValueError, match=r"(?s)another configuration; --force .*data.heldout_share: the dataset was built with 0.2, .* 0.3"
    ):
        build(other)
    assert Dataset.open(config.data.dir, verify=True).sha256 == before
    assert build(other, force=True).sha256 != before
    assert entries(tmp_path) == ["dataset", "web.jsonl"]
    mixed = other.model_copy(
        update={"data": other.data.model_copy(update={"mixture": {"temperature": 9.0}, "dir": str(tmp_path / "dataset")})}
    )
    assert Dataset.open(config.data.dir).check_config(mixed) == []


def test_a_second_build_in_one_process_compares_its_own_texts(tmp_path: Path) -> None:
    """Its work folder is where the first one's was, and its segments have the same names; what they hold is not the same."""
    near = words(2, 200)
    config = one_source(tmp_path, [words(1, 100), near, f"{near} end", *(words(number, 200) for number in range(3, 12))])
    assert build(config).manifest.sources[0].removed == {"near": 1}
    filters = config.data.filters.model_validate({"rules": [{"signal": "characters", "min": 600}]})
    other = config.model_copy(update={"data": config.data.model_copy(update={"filters": filters})})
    assert build(other, force=True).manifest.sources[0].removed == {"filter": 1, "near": 1}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    config = one_source(tmp_path / "a", [words(number, 100) for number in range(10)])
    (tmp_path / "elsewhere").mkdir()
    Path(config.data.dir).symlink_to(tmp_path / "elsewhere")
    before = build(config).sha256
    assert build(config, force=True).sha256 == before
    assert Path(config.data.dir).is_symlink() and entries(tmp_path) == ["a", "elsewhere"]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    config = one_source(tmp_path, [words(number, 100) for number in range(10)])
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "thesis.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(ValueError, match="data.dir = .*: holds something that is not a dataset"):
            build(config, force=force)
    assert entries(tmp_path / "dataset") == ["thesis.txt"]


WORK = ".dataset.work"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("planted")])
@pytest.mark.parametrize("place", ["read_part", "tokenise", "join_audits", "make_tokenizer", "hash_file"])
def test_a_broken_build_leaves_the_old_dataset_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
) -> None:
    config = one_source(tmp_path, [words(number, 100) for number in range(10)])

    def broken(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(assembling if place == "hash_file" else pipeline, place, broken)
        build(config)
    assert entries(tmp_path) == [WORK, "web.jsonl"] and not list(tmp_path.rglob("unfinished-*"))
    if isinstance(error, OSError):
        assert "No space left on device; building" in str(caught.value) and "goes on from what is finished" in str(caught.value)
    build(config)
    assert entries(tmp_path) == ["dataset", "web.jsonl"]
    before = tree(tmp_path / "dataset")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(assembling if place == "hash_file" else pipeline, place, broken)
        build(config, force=True)
    assert tree(tmp_path / "dataset") == before
    assert entries(tmp_path) == [WORK, "dataset", "web.jsonl"]
    build(config, force=True)
    assert tree(tmp_path / "dataset") == before
    assert entries(tmp_path) == ["dataset", "web.jsonl"]


def test_what_is_read_is_not_read_again_and_a_mended_file_costs_its_own_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", [words(10 * number + i, 100) for i in range(4)])
    config = run_config(tmp_path / "dataset", [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/in/*.jsonl"}])
    monkeypatch.setattr(builder, "list_parts", lambda sources: list_parts(sources, limit=1))
    honest, found = pipeline.read_part, list[str]()

    def watched(part, *rest) -> None:
        found.append(part.files[0].path.name)
        if found == ["0.jsonl", "1.jsonl", "2.jsonl"]:
            raise KeyboardInterrupt
        honest(part, *rest)

    monkeypatch.setattr(pipeline, "read_part", watched)
    with pytest.raises(KeyboardInterrupt):
        build(config)
    write_jsonl(tmp_path / "in" / "1.jsonl", [words(100 + i, 90) for i in range(6)])
    assert len(build(config).documents()) == 22
    assert found[3:] == ["1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl"]


def test_a_file_system_that_takes_no_more_bytes(tmp_path: Path) -> None:
    """The real thing: the kernel refuses to grow a file."""
    config = one_source(tmp_path, [words(number, 2000) for number in range(10)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match=r"building .*dataset stopped and left it as it was; make room"):
            build(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == [WORK, "web.jsonl"] and not list(tmp_path.rglob("unfinished-*"))
    build(config)
    assert validate(Dataset.open(config.data.dir, verify=True), config, full=True) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from refractor_core.data.folder import atomic_directory
target, old = Path(sys.argv[1]), sys.argv[2] == "exchange"
rename = os.rename
def kill(source, destination):
    rename(source, destination)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = kill
with atomic_directory(target) as folder:
    (folder / "new").write_text("new")
    if not old:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "exchange"])
def test_the_next_build_tidies_up_after_a_kill(tmp_path: Path, moment: str) -> None:
    config = one_source(tmp_path, [words(number, 100) for number in range(10)])
    before = build(config).sha256
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, config.data.dir, moment], env=environment, check=False)
    assert done.returncode == -9 and len(entries(tmp_path)) > 2
    assert build(config).sha256 == before
    assert entries(tmp_path) == ["dataset", "web.jsonl"]


def test_a_source_that_gives_nothing_is_named_with_what_became_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.0 \(source 'web'\): no .*; 3 were found, .*: min_characters 3; loosen"):
        build(one_source(tmp_path, ["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"data.sources.0 \(source 'web'\): no .*; 1 were found, .*: unreadable_file 1; .*is empty"):
        build(one_source(tmp_path, []))
    (tmp_path / "web.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"data.sources.0 \(source 'web'\): no document stays; 0 were found"):
        build(run_config(tmp_path / "dataset", [{"name": "web", "kind": "jsonl", "path": str(tmp_path / "web.jsonl")}]))
    assert entries(tmp_path) == [WORK, "web.jsonl"]


def test_a_source_that_cannot_be_read_shows_where(tmp_path: Path) -> None:
    config = one_source(tmp_path, ["a"])
    (tmp_path / "web.jsonl").write_text('{"txt": 1}\nnot json\n[2]\n')
    with pytest.raises(ValueError, match=r"missing_text_key 2, invalid_json 1; .*web.jsonl:1: .*'text'; mend the files"):
        build(config)


def test_a_damaged_dataset_is_not_called_built(tmp_path: Path) -> None:
    config = one_source(tmp_path, [words(number, 100) for number in range(10)])
    path = build(config).path / "train" / "web.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)web.bin: SHA-256 .*data build CONFIG --force"):
        build(config)
    build(config, force=True)
    build(config)


def test_a_source_whose_documents_are_all_held_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_source(tmp_path, [words(0, 100)])
    monkeypatch.setattr(tokenising, "chosen", lambda path, share: True)
    with pytest.raises(ValueError, match=r"data.sources.0 \(source 'web'\): every document is held out"):
        build(config)


def test_a_given_tokenizer_is_part_of_the_configuration(tmp_path: Path) -> None:
    texts = [words(number, 100) for number in range(10)]
    first = build(one_source(tmp_path / "a", texts))
    (tmp_path / "tokenizer.json").write_text(first.tokenizer.json)
    config = one_source(tmp_path / "b", texts, data__tokenizer={"path": str(tmp_path / "tokenizer.json")})
    second = build(config)
    assert second.manifest.tokenizer_sha256 == first.manifest.tokenizer_sha256
    (tmp_path / "tokenizer.json").write_text(first.tokenizer.json + "\n")
    assert any("data.tokenizer.sha256" in line for line in second.check_config(config))
    (tmp_path / "tokenizer.json").unlink()  # as where it is trained on: the dataset has its own copy
    assert second.check_config(config) == []


def test_the_interpreters_library_becomes_three_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, less most of its modules."""
    library = sources.stdlib.stdlib_folder()
    whole = sources.list_stdlib
    modules = {"ast.py", "bisect.py", "calendar.py", "csv.py", "heapq.py", "json/decoder.py"}
    keep = (*modules, "LICENSE.txt", "site-packages/numpy-", "site-packages/pydantic-", "site-packages/tqdm-", "site-packages/scipy-")
    monkeypatch.setattr(sources, "list_stdlib", lambda domain: [file for file in whole(domain) if file.label.startswith(keep)])
    names = ("code", "prose", "license")
    config = run_config(tmp_path / "dataset", [{"name": name, "kind": "python_stdlib", "domain": name} for name in names])
    dataset = build(config)
    assert validate(dataset, config, full=True) == []
    assert [source.domain for source in dataset.manifest.sources] == list(names)
    assert all(source.train.documents and source.heldout.documents for source in dataset.manifest.sources)
    rows = {(row["source"], row["path"]): row for row in dataset.documents().to_pylist()}
    assert rows["code", "ast.py"]["bytes"] == (library / "ast.py").stat().st_size
    assert rows["code", "ast.py"]["license"] == "PSF-2.0"
    assert rows["code", "ast.py"]["split"] == rows["prose", "ast.py"]["split"]
