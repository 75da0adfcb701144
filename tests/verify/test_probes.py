"""What ranks answer to the probes is judged by the worst of them, whichever rank it is."""

import math

import pytest

from refractor_core.verify.probes import Answers, judge
from refractor_core.verify.result import LayoutResult

CASES = [(math.nan, "documents", "crosses them"), (math.nan, "uniform", "off ln V"), (1e-6, "documents", "crosses them")]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("value", "probe", "told"), CASES)
def test_one_rank_with_a_wrong_answer_is_enough(place, value, probe, told):
    """A loss that is no number must not hide behind another rank's good answer."""
    answers = [Answers(0.0, 0.0, {}) for _ in range(3)]
    answers[place] = Answers(**{"documents": 0.0, "uniform": 0.0, "weights": {}, probe: value})
    assert told in judge({}, answers, 1e-12)
    result = LayoutResult("tensor=2", 3, 0.0, "", 0.0, True, loss_tolerance=1e-12).with_probes({}, answers)
    assert not result.passed and result.probe_error >= 1e-6


def test_good_answers_pass():
    assert judge({}, [Answers(1e-13, 0.0, {}), Answers(0.0, 1e-13, {})], 1e-12) == ""
