from dataclasses import replace

import pytest

from chunkft_compile.planner.problem import Chunk, Kind, Role, Segment, Step
from tests.planner.planner_problems import cost, plain_kind, transformer


def test_kinds_refuse_options_of_one_name() -> None:
    twice = (cost("keep", 1, 0, 0, 1, 1), cost("keep", 2, 0, 0, 1, 1))
    with pytest.raises(ValueError, match="share a name"):
        replace(plain_kind(), last=twice)
    with pytest.raises(ValueError, match="at least one option"):
        Kind((), twice[:1], twice[:1], twice[:1])


def test_problem_refuses_what_does_not_exist() -> None:
    problem = transformer(2, 0.5)
    with pytest.raises(ValueError, match="odd is of kind 7"):
        replace(problem, segments=(Segment("odd", 7, 0, 0),))
    with pytest.raises(ValueError, match="high starts in segment 9"):
        replace(problem, chunks=(Chunk("high", 0, 9, 1, 0, 0),))


def test_costs_follow_the_kind() -> None:
    problem = transformer(2, 0.5)
    assert problem.costs(1, Role.LAST) is problem.kinds[1].last
    assert problem.costs(3, Role.FROZEN) is problem.kinds[2].frozen


def test_steps_have_ascending_chunks() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Step((2, 1), ("keep",), 0, 0)


def test_costs_are_not_negative() -> None:
    with pytest.raises(ValueError, match="negative cost"):
        cost("keep", -1, 0, 0, 0, 0)
