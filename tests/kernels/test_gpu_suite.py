"""The GPU suite, without a GPU: its rooms run in rehearsal, a wrong, failing or absent contender is told, goals are judged as they are
stated."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from refractor_kernels.gpu.backend import HOW_TO_GET
from tests.components import missing
from tests.house.tree import ROOT


@pytest.fixture
def rooms(monkeypatch):
    """The suite's modules, which are no part of a package."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu import attention, contest, head, report, rows, step, timing

    return SimpleNamespace(attention=attention, contest=contest, head=head, report=report, rows=rows, step=step, timing=timing)


def rehearse(folder, *only: str) -> tuple[subprocess.CompletedProcess, dict]:
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--rehearse", "--into", str(folder), "--only", *only]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads((folder / "gpu_suite_rehearsal.json").read_text())


def test_a_room_is_rehearsed(tmp_path):
    done, written = rehearse(tmp_path, "head")
    assert done.returncode == 0, done.stdout + done.stderr
    status = {row["contender"]: row["status"] for row in written["rows"]}
    assert status["ours"] == status["torch"] == "ok" and written["rehearsal"]
    assert "2·T·V·D" in written["formulas"]["linear + cross-entropy"]
    if find_spec("liger_kernel") is None:
        assert status["liger"].startswith("absent: No module named") and "| liger: absent" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_suite_is_rehearsed(tmp_path):
    done, written = rehearse(tmp_path, "checks", "experts", "attention", "head", "rows", "step")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["work"] for row in written["rows"]} >= {
        "checks",
        "experts",
        "attention",
        "linear + cross-entropy",
        "RMSNorm",
        "training step",
    }
    assert all(row["status"] == "ok" for row in written["rows"] if row["contender"] in ("ours", "auto", "stock PyTorch", "grouped_mm"))


def test_what_is_wrong_failing_absent_or_slow_is_told_and_ends_nothing(rooms):
    def fails(x):
        raise RuntimeError("no luck\nat all")

    def absent(case):
        raise ImportError("No module named 'peer'")

    contenders = [
        rooms.contest.Contender("right", lambda case: lambda x: x.square()),
        rooms.contest.Contender("wrong", lambda case: lambda x: x.square() * 1.1),
        rooms.contest.Contender("wrong gradient", lambda case: lambda x: x.detach().square() + 0 * x),
        rooms.contest.Contender("not a number", lambda case: lambda x: x.square() * float("nan")),
        rooms.contest.Contender("failing", lambda case: fails),
        rooms.contest.Contender("absent", absent),
        rooms.contest.Contender("prepared", lambda case: lambda x: x.square(), prepare=lambda tensors: [t * 1.0 for t in tensors]),
    ]
    case = rooms.contest.Case("squares", "5", lambda device: [torch.randn(5).bfloat16()], (0,), flops=(5.0, 15.0))
    clock = rooms.timing.Clock(torch.device("cpu"), time.monotonic() + 600)
    found = {row["contender"]: row for row in rooms.contest.contest([case], contenders, contenders[0], clock)}
    assert found["right"]["status"] == found["prepared"]["status"] == "ok" and found["right"]["both_tflops"] > 0
    assert all(found[name]["status"].startswith("wrong: error ") for name in ("wrong", "wrong gradient", "not a number"))
    assert found["failing"]["status"] == "failed: RuntimeError: no luck"
    assert found["absent"]["status"] == "absent: No module named 'peer'"
    slow = rooms.contest.Contender("slow", lambda case: lambda x: time.sleep(60))
    (row,) = rooms.contest.contest([case], [slow], contenders[0], clock, each=0.05)
    assert row["status"].startswith("left out: took more than")
    clock.deadline = 0.0
    assert rooms.contest.contest([case], contenders[:1], contenders[0], clock)[0]["status"] == "left out: no time left"


def test_no_case_and_no_contender_takes_the_time_of_the_others(rooms, monkeypatch):
    """Here one takes all that it may in each case, at first for ever more than there is."""
    now, spent, built = [0.0], [], []
    monkeypatch.setattr(rooms.timing, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))
    clock = rooms.timing.Clock(torch.device("cpu"), 60.0)

    @contextmanager
    def limit(seconds):
        spent.append(seconds)
        yield

    monkeypatch.setattr(clock, "limit", limit)

    def greedy(case):
        now[0] += spent[-1]
        raise rooms.timing.OutOfTime("took all")

    def quick(name, case):
        built.append((name, case.name))
        return lambda x: x.square()

    same = rooms.contest.Case("squares", "small", lambda device: [torch.randn(5).bfloat16()], (0,))
    cases = [rooms.contest.Case("squares", str(n), same.inputs, (0,), small=same, share=share) for n, share in enumerate((1.0, 1.0, 2.0))]
    contenders = [rooms.contest.Contender("greedy", greedy)] + [rooms.contest.Contender(n, partial(quick, n)) for n in ("a", "b")]
    found = rooms.contest.contest(cases, contenders, contenders[1], clock)
    assert [row["status"] for row in found] == ["left out: took all", "ok", "ok"] * 3
    assert spent[0] == pytest.approx(0.8 * 60 * 2 / 5) and now[0] < 60
    assert [name for name, case in built if case == "small"].count("b") == 1  # judged once for all cases


def test_what_decides_a_goal_comes_before_what_does_not(rooms):
    """Each length once, FlexAttention for packed documents only, the oracle last."""
    cases = rooms.attention.cases(SimpleNamespace(rehearsal=False))
    names = [case.name for case in cases]
    assert names == ["2048", "4096", "8192", "16384", "32768", "131072", "8192 packed", "32768 packed", "131072 packed"]
    of = {case.name: [c.name for c in rooms.attention.CONTENDERS if c.only(case)] for case in cases}
    assert of["131072"] == ["auto", "ours", "SDPA cuDNN", "SDPA flash", "FlashAttention 4"]
    assert of["131072 packed"] == ["auto", "ours", "FlexAttention", "FlashAttention 4", "torch reference"]
    exact = [c.name not in rooms.report.INEXACT for c in rooms.head.CONTENDERS[:-1]]
    assert exact == sorted(exact, reverse=True)


def test_imports_count(monkeypatch, tmp_path):
    """A room's time is from the start of its process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_suite
    from gpu import rows

    clocks = []
    monkeypatch.setattr(rows, "run", lambda clock: clocks.append(clock) or [])
    monkeypatch.setattr(gpu_suite, "BEGUN", time.monotonic() - 100)
    monkeypatch.setattr("tests.kernels.interpreted.bfloat16.install", lambda: None)
    gpu_suite._room(SimpleNamespace(room="rows", rehearse=True, seconds=90.0, file=tmp_path / "rows.json"))
    assert clocks[0].left < 0 and (tmp_path / "rows.json").read_text() == "[]"


def test_gradients_that_are_small_are_judged_too(rooms):
    """Those of a mean over tokens are far below its value's last place."""
    case = rooms.head.case("small", (64, 400, 32))
    judge = rooms.contest.Judge(rooms.head.PLAIN, case, torch.device("cpu"))
    build = lambda case: lambda x, w, labels: rooms.head.plain(case)(x.detach(), w.detach(), labels) + 0 * (x.sum() + w.sum())  # noqa: E731
    assert judge(rooms.head.PLAIN, case) <= 1 < judge(rooms.contest.Contender("without gradients", build), case)


def test_compiled_peers_are_compiled_for_the_size_that_is_timed(rooms, monkeypatch):
    seen, compiles = [], torch.compile

    def keep(graph, inputs):
        seen.extend(node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, backend, **options: compiles(function, backend=keep, **options))
    norm = rooms.rows.cases(rooms.timing.Clock(torch.device("cpu"), 0.0))[0]
    for size in (8, 16, 24):
        rooms.head.compiled(norm)(torch.randn(size, 4), torch.randn(2 * size, 4), torch.zeros(size, dtype=torch.int64))
        rooms.rows.compiled(norm)(torch.randn(5, size), torch.randn(size))
    assert len(seen) == 15 and all(isinstance(x, torch.Tensor) and all(type(n) is int for n in x.shape) for x in seen)


def test_the_gpu_is_busy_while_the_host_launches(rooms, monkeypatch):
    """So that the host's time is no part of a call's. The more it takes, the more is overwritten first."""
    event = lambda **options: SimpleNamespace(record=lambda: order.append("event"), elapsed_time=lambda last: 1.0)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", event)
    now = [0.0]
    monkeypatch.setattr(rooms.timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = rooms.timing.Clock(torch.device("cpu"), 0.0)
    clock.rehearsal, clock._flush = False, SimpleNamespace(zero_=lambda: order.append("flush"))
    for launch, flushes in ((0.0, 1), (9e-5, 2), (1.01e-3, 21), (0.02, 50)):
        order: list[str] = []
        clock.seconds(lambda launch=launch: now.append(now.pop() + launch), budget=0.0)
        assert order == (["flush"] * flushes + ["event"] * 2) * 3


def test_goals_are_judged_as_stated(rooms, tmp_path):
    def row(work, case, contender, **figures):
        return {"work": work, "case": case, "contender": contender, "status": "ok", **figures}

    rows = [
        row("experts", "qwen", "ours", forward_ms=1.0, both_ms=3.0, saved_mib=10.0, both_tflops=1.0),
        row("experts", "qwen", "ScatterMoE", forward_ms=1.5, both_ms=4.4, saved_mib=9.0, both_tflops=0.7),
        row("linear + cross-entropy", "a", "ours", both_ms=2.0, peak_mib=110.0),
        row("linear + cross-entropy", "a", "torch.compile", both_ms=1.9, peak_mib=900.0),
        row("linear + cross-entropy", "a", "cut-cross-entropy filtered", both_ms=1.0, peak_mib=90.0),
        row("attention", "2048", "auto", forward_ms=1.02, both_ms=1.1),
        row("attention", "2048", "SDPA cuDNN", forward_ms=1.0, both_ms=1.0),
        row("copy", "1 GiB", "copy", forward_tbytes=3.0),
        row("SwiGLU", "b", "ours", forward_tbytes=2.7, backward_tbytes=2.4),
        row("training step", "whole", "ours", mfu=0.41),
        row("training step", "whole", "stock PyTorch", mfu=0.2) | {"status": "failed: x"},
    ]
    reached = {goal["goal"]: goal["reached"] for goal in rooms.report.goals(rows)}
    assert reached["experts qwen, forward: ≥ 1.5 × ScatterMoE"] is True
    assert reached["experts qwen, forward and backward: ≥ 1.5 × ScatterMoE"] is False
    assert reached["experts qwen, forward: ≥ 1.3 × liger"] is None
    assert reached["experts qwen: memory for the backward ≤ every peer's"] is False
    assert reached["head a: fastest exact"] is False
    assert reached["head a: memory ≤ 1.1 × the smallest (exact)"] is True
    assert reached["head a: memory ≤ 1.1 × the smallest (any)"] is False
    assert reached["attention 2048, forward: auto within 3 % of the best"] is True
    assert reached["attention 2048, both: auto within 3 % of the best"] is False
    assert reached["SwiGLU b, forward: ≥ 85 % of the copy"] is True and reached["SwiGLU b, backward: ≥ 85 % of the copy"] is False
    assert reached["training step: MFU ≥ 40 % with real routing"] is True
    rows[0]["status"] = "wrong: error 3"
    assert {goal["goal"]: goal["reached"] for goal in rooms.report.goals(rows)}["experts qwen, forward: ≥ 1.5 × ScatterMoE"] is None
    assert "failed: x" in rooms.report.told(rows, [])
    if find_spec("matplotlib") is not None:
        assert any(path.name == "run_experts.svg" for path in rooms.report.draw(rows, tmp_path, "run"))


def test_a_step_of_stock_ops_has_none_of_our_kernels(rooms, monkeypatch):
    """Nor in its optimizer."""
    asked = []
    monkeypatch.setattr(rooms.step, "Zero1", lambda *arguments: asked.append(arguments[3:]) or SimpleNamespace(load=lambda fill: None))
    for kernels in ("auto", "torch"):
        rooms.step.Proxy(rooms.step.run_config(kernels, head=False, tiny=True), torch.device("cpu"))
    assert asked == [("auto",), ("torch",)]


def test_a_step_that_fails_leaves_routing_as_it_was(rooms, monkeypatch):
    """Or the variants after it would be called real and be balanced."""
    proxy = rooms.step.Proxy(rooms.step.run_config("torch", head=False, tiny=True), torch.device("cpu"))
    before = [router.choose for router in rooms.step.routers(proxy.model)]
    monkeypatch.setattr(proxy, "step", lambda update: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        proxy.measured(rooms.timing.Clock(torch.device("cpu"), time.monotonic() + 600), balanced=True, update=True)
    assert before and [router.choose for router in rooms.step.routers(proxy.model)] == before


def test_figures_are_kept_on_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import record

    monkeypatch.setenv("PATH", str(tmp_path))
    written = json.loads(record.write_result("figures", {"rows": [1]}, ("torch",), tmp_path).read_text())
    assert written["rows"] == [1] and written["commit"] is None


def test_figures_that_are_not_finite_are_null(monkeypatch, tmp_path):
    """The error of a contender that makes NaN is infinite, and strict readers of JSON refuse that."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import record

    def refuse(word):
        raise ValueError(word)

    figures = {"rows": [{"error": float("inf"), "spread_ms": (float("nan"), 1.5)}, {"status": "ok", "count": 3, "right": True}]}
    text = record.write_result("figures", figures, (), tmp_path).read_text()
    assert json.loads(text, parse_constant=refuse)["rows"] == [
        {"error": None, "spread_ms": [None, 1.5]},
        {"status": "ok", "count": 3, "right": True},
    ]
