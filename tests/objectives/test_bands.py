"""Verdicts are the band's inequality, layer by layer."""

import math

import pytest

from refractor_core.config.training import ObjectivesConfig, RegretConfig
from refractor_core.objectives.bands import in_band
from refractor_core.objectives.totals import RouterTotals
from tests.objectives.routers import collapsed, even

CONFIG = ObjectivesConfig(regret=RegretConfig(band=(0.0, 0.1)))


def figures(**changed):
    return {"load_balance": 1.0, "z_loss": 5.0, "regret": 0.05} | changed


def outside(metrics):
    return [(v.objective, v.layer) for v in in_band(CONFIG, metrics) if not v.inside]


@pytest.mark.parametrize(
    "name, value, inside",
    [
        ("load_balance", 0.97, True),
        ("load_balance", 0.9699, False),
        ("load_balance", 1.1001, False),
        ("z_loss", 30.0, True),
        ("z_loss", 31.0, False),
        ("regret", 0.1, True),
        ("regret", 0.11, False),
        ("regret", -1e-9, False),
        ("z_loss", math.nan, False),
        ("z_loss", math.inf, False),
    ],
)
def test_each_bound(name, value, inside):
    assert outside({2: figures(), 1: figures(**{name: value})}) == ([] if inside else [(name, 1)])


def test_one_verdict_per_objective_and_layer_in_order():
    verdicts = in_band(CONFIG, {2: figures(), 1: figures()})
    assert [(v.objective, v.layer) for v in verdicts] == [(o, layer) for o in ("load_balance", "z_loss", "regret") for layer in (1, 2)]
    assert verdicts[-1].band == (0.0, 0.1) and verdicts[-1].value == 0.05


def test_judges_what_the_totals_tell():
    found = RouterTotals()
    found.add((even(2, 8, 4, 1, layer=1), collapsed(2, 8, 4, layer=2)))
    assert outside(found.metrics()) == [("load_balance", 2)]
