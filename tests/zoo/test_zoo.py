"""Every architecture of the zoo trains in chunks: gradients of autograd, every element once a sweep, no step above its prediction."""

from dataclasses import replace

import pytest

from benchmarks.zoo import ZOO, Entry
from benchmarks.zoo.trial import attempt
from tests.support.allocator import allocator_or_skip

QUICK = {"MLP", "Mixtral", "ViT"}
"""One of each sort is in the default run; all of them: `pytest -k zoo -n 2`."""


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*changes Python state:UserWarning")  # RecurrentGemma's cache, which training does not use
@pytest.mark.usefixtures("captures_once")
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name, marks=() if e.name in QUICK else pytest.mark.slow) for e in ZOO])
def test_it_trains(entry: Entry) -> None:
    outcome = attempt(entry, allocator_or_skip())
    assert not outcome.refused
    assert outcome.works, outcome
    assert not outcome.dense
    assert outcome.measured_nbytes > 0
    assert outcome.steps > 1 or entry.name in {"UNet", "ConvNeXt"}  # activations of images outweigh their weights


def test_a_failure_is_seen() -> None:
    """The trial itself: gradients of another loss than the one that is compared with must not pass."""
    mlp = next(entry for entry in ZOO if entry.name == "MLP")
    calls = iter(range(1000))
    wrong = replace(mlp, loss=lambda output: output.square().mean() * (1.0 if next(calls) == 0 else 1.01))
    outcome = attempt(wrong, allocator_or_skip())
    assert not outcome.works
    assert 0.005 < outcome.difference < 0.02
