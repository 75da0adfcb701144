"""Any layout, the same gradients: loss and every parameter's gradient in float64, over a cover of the lattice of legal layouts.

``benchmarks/layouts.py`` runs the whole lattice.
"""

import pytest

from refractor_core.verify import lattice
from refractor_core.verify.layouts import verify_layouts
from tests.distributed.documents import write
from tests.distributed.lattice import MODELS, covering, every_layout, legal


def test_the_cover_tries_every_pair_of_choices():
    pairs = set().union(*(lattice.pairs(case.choices) for case in legal(8)))
    assert set().union(*(lattice.pairs(case.choices) for case in covering(8))) == pairs
    assert len(covering(8)) < 80
    for axis, values in lattice.DEGREES.items():
        if axis not in NOT_YET:
            assert {case.choices[axis] for case in covering(8)} == set(values), axis
    assert len({case.layout for case in every_layout(8)}) == len({case.layout for case in legal(8)})


@pytest.mark.parametrize("model", MODELS)
def test_a_cover_of_the_lattice_agrees_with_one_process(tmp_path, model):
    layouts = [case.layout for case in covering(8) if case.model == model]
    for result in verify_layouts(write(tmp_path, **MODELS[model]), layouts, log=print):
        assert result.passed, f"{result.layout}: {result.worst_parameter} {result.worst_gradient_error:.1e}\n{result.culprit}"
        assert result.worst_gradient_error <= 1e-9 and result.loss_error <= 1e-12


NOT_YET = ("pipeline", "virtual_pipeline", "schedule")
