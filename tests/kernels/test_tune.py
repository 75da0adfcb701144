"""Tuning climbs to what is faster and allowed; its file is adopted if it fits; all ranks launch what rank 0 has."""

from dataclasses import replace

import pytest

from refractor_kernels import attention_order, tune
from refractor_kernels.gpu import tables

START = tables.Bucket({"columns": 64}, {"ROWS": 8, "BLOCK": 64}, num_warps=2, num_stages=2, grid={"programs": 132})


@pytest.fixture
def restored():
    before = tables.buckets("rms_norm_forward")
    yield
    tables.put("rms_norm_forward", before)


def test_it_climbs_to_the_fastest_that_is_allowed():
    cost = lambda b: 1.0 + abs(b.num_warps - 8) + abs(b.constants["ROWS"] - 2) + 3 / b.grid["programs"]  # noqa: E731
    found = tune.climb(START, lambda b: b.num_warps <= 4, cost)
    assert (found.num_warps, found.constants) == (4, {"ROWS": 2, "BLOCK": 64})
    assert tune.climb(START, lambda b: False, cost) == START


def test_noise_moves_nothing():
    assert tune.climb(START, lambda b: True, lambda b: 1.0 if b == START else 0.99) == START


def test_neighbours_leave_sizes_alone():
    found = list(tune.neighbours(START))
    assert len(found) == len(set(map(str, found))) >= 8
    assert all(bucket.shape == START.shape for bucket in found)


def test_a_file_is_adopted(tmp_path, restored):
    path, shipped = tmp_path / "tables.json", tables.buckets("rms_norm_forward")
    other = replace(shipped[0], num_warps=8)
    tables.put("rms_norm_forward", (other, *shipped[1:]))
    path.write_text(tables.written(["rms_norm_forward"]))
    tables.put("rms_norm_forward", shipped)
    tables.adopt(path)
    assert tables.choose("rms_norm_forward", columns=64) == other


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "holds no tuning tables"),
        ("[]", "holds no tuning tables"),
        ('{"adamw": [{"to": {}}]}', "holds no tuning tables"),
        ('{"attention_order": []}', "is no list of entries by architecture"),
        ('{"attention_order": {"sm90": [{"to": {}, "order": ["cudnn"], "source": "x"}]}}', "with torch"),
        ('{"attention_order": {"sm90": [{"to": {"width": 64}, "order": ["torch"], "source": "x"}]}}', "must have no bounds"),
        ('{"adam": []}', "there is no kernel adam; there are rms_norm_forward"),
        ('{"adamw": []}', "the buckets of adamw are not those of this version"),
        ('{"adamw": [{"to": {}, "constants": {"BLOCK": 64, "TAIL": 128}, "num_warps": 4, "num_stages": 1}]}', "the buckets of adamw"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, text, told):
    path = tmp_path / "tables.json"
    path.write_text(text)
    before = tables.written()
    with pytest.raises(ValueError, match=told):
        tables.adopt(path)
    assert tables.written() == before


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json holds no tuning tables"):
        tables.adopt(tmp_path / "nowhere.json")


def _after_sharing(rank: int) -> tuple[int, str]:
    (own,) = tables.buckets("adamw")
    tables.put("adamw", (replace(own, num_warps=1 << rank),))
    attention_order.put({"other": [{"to": {}, "order": ["torch"], "source": f"of rank {rank}"}]})
    tables.share()
    return tables.choose("adamw").num_warps, attention_order.find("other", length=1, width=1, generation=None)[1]


def test_all_ranks_take_rank_0s(ranks):
    assert ranks(3, _after_sharing) == [(1, "of rank 0")] * 3
