"""Any layout, the same gradients: loss and every parameter's gradient in float64, over a cover of the lattice of legal layouts.

``benchmarks/layouts.py`` runs the whole lattice.
"""

import pytest

from refractor_core.verify import lattice
from refractor_core.verify.layouts import verify_runs
from tests.distributed.documents import write
from tests.distributed.lattice import MODELS, covering, every_layout, legal


def test_the_cover_tries_every_pair_of_choices():
    pairs = set().union(*(lattice.pairs(case.choices) for case in legal(8)))
    assert set().union(*(lattice.pairs(case.choices) for case in covering(8))) == pairs
    assert len(covering(8)) < 80
    for axis, values in lattice.DEGREES.items():
        assert {case.choices[axis] for case in covering(8)} == set(values), axis
    assert len({case.layout for case in every_layout(8)}) == len({case.layout for case in legal(8)})


@pytest.mark.timeout(900)
def test_a_cover_of_the_lattice_agrees_with_one_process(tmp_path):
    runs = []
    for model, changes in MODELS.items():
        (tmp_path / model).mkdir()
        runs.append((write(tmp_path / model, **changes), [case.layout for case in covering(8) if case.model == model]))
    for model, results in zip(MODELS, verify_runs(runs, log=print)):
        for result in results:
            told = f"{model}, {result.layout}: {result.worst_parameter} {result.worst_gradient_error:.1e}\n{result.culprit}"
            assert result.passed and result.worst_gradient_error <= 1e-9 and result.loss_error <= 1e-12, told
