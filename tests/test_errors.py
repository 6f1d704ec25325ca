"""Errors come back from another process as they were."""

import pickle

import pytest

from chunkft_compile import BudgetError, MemoryPromiseError
from chunkft_compile.planner import StepsError

ERRORS = [
    BudgetError("too small", smallest_nbytes=7, binding="FORWARD block 1"),
    StepsError("too few", smallest_nbytes=8, binding="UPDATE"),
    MemoryPromiseError("too much", measured_nbytes=5, promised_nbytes=4),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_pickling_keeps_the_figures(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
