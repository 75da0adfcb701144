"""A part's documents and audit rows are those of its files; faults stop the build where the configuration says so."""

import subprocess
import sys
from pathlib import Path

import pytest

from refractor_core.data.audit import read_audit
from refractor_core.data.parts import PartReader, list_parts
from refractor_core.data.reading import AUDIT, has_faults, read_part
from tests.data.corpora import run_config, words, write_jsonl


class Watched:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.done = 0

    def begin(self, item: str) -> None:
        self.begun.append(item)

    def advance(self, count: int) -> None:
        self.done += count


def test_documents_stay_in_order_and_the_rest_is_told(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", [words(10 * number + i, 100) if i % 4 else "short" for i in range(10)])
    (tmp_path / "2.jsonl").write_text("{broken\n")
    data = run_config(tmp_path, [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/*.jsonl"}]).data
    (part,) = list_parts(data.sources)
    watch = Watched()
    poison = {f"{tmp_path}/1.jsonl": "planted"}
    read_part(part, data, tmp_path, watch, poison)
    assert [path.rpartition("/")[2] for path in watch.begun] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    reader = PartReader(tmp_path / "000000.arrow")
    kept = [i for i in range(10) if i % 4]
    assert [reader.text(row).decode() for row in range(len(reader))] == [words(i, 100) for i in kept]
    found = [(row.path.rpartition("/")[2], row.stage, row.rule) for row in read_audit(tmp_path / AUDIT)]
    short = [(f"0.jsonl:{i + 1}", "filter", "min_characters") for i in range(10) if i % 4 == 0]
    assert sorted(found) == sorted([*short, ("1.jsonl", "read", "kills_workers"), ("2.jsonl:1", "read", "invalid_json")])
    assert watch.done == part.bytes and has_faults(tmp_path)
    stop = data.model_copy(update={"on_error": "stop"})
    with pytest.raises(ValueError, match=r"2.jsonl:1 \(source 'web'\): invalid_json: .*data.on_error: quarantine"):
        read_part(part, stop, tmp_path, watch, {})


def test_a_build_and_its_report_import_neither_torch_nor_pandas(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.data.test_reading import test_documents_stay_in_order_and_the_rest_is_told as run\n"
        "run(Path(sys.argv[1]))\n"
        "from refractor_core.data import build\n"
        "from tests.data.corpora import run_config, write_corpus\n"
        "from refractor_core.data.report import write_report\n"
        "config = run_config(sys.argv[1] + '/set', write_corpus(Path(sys.argv[1]) / 'corpus'))\n"
        "write_report(build(config), config)\n"
        "print({'torch', 'pandas'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
