"""The endpoint, read over loopback as Prometheus would."""

import math
import re
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from refractor_core.telemetry.catalogue import CATALOGUE
from refractor_core.telemetry.exporter import Exporter

LAYER = {
    "layer": 1,
    "load_balance": 1.01,
    "z_loss": 4.0,
    "regret": 0.03,
    "regret_bias": 0.02,
    "regret_drop": 0.01,
    "load_entropy": 0.99,
    "token_entropy": 0.7,
    "max_violation": 0.2,
    "dropped": 0.1875,
    "counts": [10, 6],
}


def row(step, **changes):
    figures = {
        "step": step,
        "tokens": 16 * step,
        "loss": 2.5,
        "loss_language_model": 2.4,
        "loss_load_balance": 1.01,
        "loss_z_loss": 4.0,
        "loss_regret": 0.03,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "sequence_length": 8,
        "loss_scale": 1.0,
        "skipped": False,
        "sources": {"a": 2},
        "router": [LAYER],
        "tokens_per_second": 100.0,
        "step_seconds": 0.16,
        "mfu": None,
    }
    return figures | changes


@pytest.fixture
def exporter():
    made = Exporter("127.0.0.1", 0, run_id="r", config_sha="c", version="v")
    yield made
    made.close()


def scrape(exporter):
    with urllib.request.urlopen(exporter.url, timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_a_row_is_found_in_a_scrape(exporter):
    exporter.observe_step(row(1))
    exporter.observe_step(row(2, loss=None, skipped=True))
    exporter.observe_checkpoint(0.5)
    samples = scrape(exporter)
    expected = {
        ("run_info", (("config_sha", "c"), ("run_id", "r"), ("version", "v"))): 1,
        ("trainer_step", ()): 2,
        ("trainer_tokens_total", ()): 32,
        ("trainer_loss", (("component", "language_model"),)): 2.4,
        ("trainer_loss_scale", ()): 1.0,
        ("trainer_nonfinite_total", ()): 1,
        ("trainer_steps_skipped_total", (("reason", "nonfinite"),)): 1,
        ("trainer_step_duration_seconds_count", ()): 2,
        ("trainer_step_duration_seconds_bucket", (("le", "0.2"),)): 2,
        ("trainer_step_duration_seconds_bucket", (("le", "0.1"),)): 0,
        ("moe_expert_tokens_total", (("expert", "0"), ("layer", "1"))): 20,
        ("moe_dropped_tokens_total", (("layer", "1"),)): 6,
        ("moe_router_regret_ratio", (("kind", "drop"), ("layer", "1"))): 0.01,
        ("checkpoint_save_duration_seconds_count", ()): 1,
    }
    assert {key: samples.get(key) for key in expected} == expected
    assert math.isnan(samples["trainer_loss", (("component", "total"),)])
    assert ("trainer_loss", (("component", "scale"),)) not in samples


def test_every_metric_of_the_catalogue_can_be_emitted_and_nothing_else_is(exporter):
    exporter.observe_step(row(1, loss=None, skipped=True))
    exporter.observe_checkpoint(0.5)
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in scrape(exporter)}
    created = {name for name in names if name.endswith("_created")}  # the library's own, one per counter and histogram
    assert names - created == {metric.name for metric in CATALOGUE}
    with pytest.raises(ValueError, match="not in the catalogue"):
        exporter.set("trainer_surprise", 1)


def test_two_exporters_share_nothing(exporter):
    other = Exporter("127.0.0.1", 0)
    try:
        exporter.set("trainer_step", 7)
        assert scrape(other)["trainer_step", ()] == 0 and scrape(exporter)["trainer_step", ()] == 7
    finally:
        other.close()


def test_a_taken_port_names_the_key_and_a_closed_one_is_free_again(exporter):
    with pytest.raises(ValueError, match=rf"telemetry\.prometheus_port = {exporter.port}"):
        Exporter("127.0.0.1", exporter.port)
    first = Exporter("127.0.0.1", 0)
    port = first.port
    first.close()
    Exporter("127.0.0.1", port).close()
    with pytest.raises(ValueError, match="telemetry.prometheus_host"):
        Exporter("192.0.2.1", 0)


def test_a_resumed_runs_tokens_go_on_from_where_they_were():
    resumed = Exporter("127.0.0.1", 0, tokens=32)
    try:
        assert scrape(resumed)["trainer_tokens_total", ()] == 32
        resumed.observe_step(row(3))
        assert scrape(resumed)["trainer_tokens_total", ()] == 48
    finally:
        resumed.close()


def test_a_row_without_routers_and_a_repeated_row_are_fine(exporter):
    dense = {key: value for key, value in row(3).items() if key != "router"}
    exporter.observe_step(dense)
    exporter.observe_step(dense)
    assert scrape(exporter)["trainer_tokens_total", ()] == 48


def test_the_catalogue_keeps_prometheus_conventions():
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name) and metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram") and list(metric.buckets) == sorted(metric.buckets)
        assert not set(metric.labels) & {"step", "document"}
