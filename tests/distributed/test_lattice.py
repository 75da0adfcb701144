"""Any layout, the same gradients: loss and every parameter's gradient in float64, over the lattice of legal layouts."""

import pytest

from refractor_core.verify.layouts import verify_layouts
from tests.distributed.documents import write
from tests.distributed.lattice import AXES, MODELS, legal, pairs, pairwise, text

LARGEST_TESTED = [  # of eight ranks: every axis at once, and each where it is largest
    ("gqa-capacity-tied", 2, True, 2, 2, 4),
    ("one-kv-head", 4, True, 4, 2, 2),
    ("mla-capacity", 4, False, 2, 2, 2),
]
COVER = pairwise(legal(4))


def test_the_cover_tries_every_pair_of_choices():
    tried = set().union(*map(pairs, COVER))
    assert tried == set().union(*map(pairs, legal(4))) and len(COVER) < 40
    for axis, values in {"tensor": {1, 2, 4}, "expert": {1, 2, 4}, "expert_tensor": {1, 2}, "sequence": {True, False}}.items():
        assert {case[AXES.index(axis)] for case in COVER} == values


def _verify(folder, model, cases):
    results = verify_layouts(write(folder, **MODELS[model]), [text(case) for case in cases])
    assert len(results) == len(cases)
    for result in results:
        assert result.passed, f"{result.layout}: {result.worst_parameter} {result.worst_gradient_error:.1e}\n{result.culprit}"
        assert result.worst_gradient_error <= 1e-9 and result.loss_error <= 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_a_cover_of_the_lattice_agrees_with_one_process(tmp_path, model):
    _verify(tmp_path, model, [case for case in [*COVER, *LARGEST_TESTED] if case[0] == model])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_lattice_agrees_with_one_process(tmp_path, model):
    _verify(tmp_path, model, [case for case in legal(8) if case[0] == model])
