"""What is too large is told and left out, in bounded memory; noise in lines raises nothing."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import read, rules

HUGE = 20_000_000
CAPPED = """
import resource, sys
from tests.data.sources.reading import read, rules
read("jsonl", sys.argv[2])  # everything that is loaded once
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[3]),) * 2)
documents, unread = read("jsonl", sys.argv[1], max_document_bytes=1_000_000)
print([item.text for item in documents], rules(unread))
"""


def capped(path: Path, small: Path, room: int) -> subprocess.CompletedProcess:
    """Reads ``path`` in a process that may take ``room`` bytes more than it had before."""
    return subprocess.run([sys.executable, "-c", CAPPED, path, small, str(room)], capture_output=True, text=True)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_huge_line_is_told_and_never_held(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": text}).encode() for text in ("before", "x" * HUGE, "after", "y" * HUGE)]
    content = b"\n".join(lines)
    (tmp_path / f"t.jsonl{suffix}").write_bytes(gzip.compress(content, 1) if suffix else content)
    (tmp_path / "small.jsonl").write_text("{}")
    found = capped(tmp_path / f"t.jsonl{suffix}", tmp_path / "small.jsonl", 16_000_000)
    expected = [(f"t.jsonl{suffix}:2", "oversized"), (f"t.jsonl{suffix}:4", "oversized")]
    assert found.stdout.strip() == f"['before', 'after'] {expected}", found.stderr
    assert capped(tmp_path / f"t.jsonl{suffix}", tmp_path / "small.jsonl", 100_000).returncode != 0  # the cap is a cap


def test_text_over_the_limit_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 101))
    documents, unread = read("text", tmp_path / "*", max_document_bytes=100)
    assert ([len(item.text) for item in documents], rules(unread)) == ([100], [("b.txt.gz", "oversized")])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), packed=st.booleans())
def test_noise_raises_nothing(tmp_path: Path, suffix: str, content: bytes, packed: bool) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(gzip.compress(content) if packed else content)
    for kind in ("text", "jsonl"):
        documents, unread = read(kind, path, max_document_bytes=150)
        assert all(item.path.startswith(str(path)) for item in [*documents, *unread])
