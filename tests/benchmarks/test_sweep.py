"""What the headline benchmark makes of its figures: budgets of ours, methods that cannot meet one, aims met and missed."""

from benchmarks.contestants import BADAM, HIFT, PLAIN
from benchmarks.sweep import Aim, Row, judge, our_entries, unable
from benchmarks.trials import Entry, Peak, Refusal, Times

MB = 1_000_000


def _rival(name: str, nbytes: int, steps: int, ratio: float) -> Row:
    return Row(Entry(name, 12), Peak(nbytes, 0, steps), Times([ratio] * steps, [1.0] * steps, 1.0))


def _ours(budget_nbytes: int, update: str, steps: int, ratio: float) -> Row:
    entry = Entry("ours", 12, budget_nbytes, update)
    return Row(entry, Peak(budget_nbytes, 0, steps, budget_nbytes), Times([ratio] * steps, [1.0] * steps, 1.0))


RIVALS = [_rival(PLAIN, 2200 * MB, 1, 1.0), _rival(HIFT[0], 1140 * MB, 14, 0.6), _rival(BADAM[0], 1130 * MB, 14, 0.6)]


def _found(ours: list[Row]) -> dict[str, Aim]:
    return {aim.text: aim for aim in judge(RIVALS, ours)}


def test_budgets_within_a_hundredth_share_a_row_at_the_smaller() -> None:
    entries = our_entries(2, [1_000_000, 700_000, 1_009_000, 1_011_000], ["held", "immediate"])
    assert [entry.budget_nbytes for entry in entries] == [1_011_000] * 2 + [1_000_000] * 2 + [700_000] * 2
    assert [entry.update for entry in entries] == ["held", "immediate"] * 3


def test_methods_that_need_more_are_named_with_their_need() -> None:
    assert unable(RIVALS, 1135 * MB) == f"{PLAIN} (2200.0); {HIFT[0]} (1140.0)"
    assert unable(RIVALS, 3000 * MB) == "none"


def test_aims_are_met_by_figures_that_meet_them() -> None:
    aims = _found([_ours(1130 * MB, "held", 2, 1.3), _ours(760 * MB, "immediate", 1, 1.29), _ours(700 * MB, "held", 20, 0.5)])
    assert [aim.text for aim in aims.values() if not aim.met] == []
    assert len(aims) == 7


def test_aims_are_missed_by_a_slow_sweep_and_by_nothing_below_their_bytes() -> None:
    aims = _found([_ours(1130 * MB, "held", 3, 1.0), _ours(1135 * MB, "held", 2, 1.0), _ours(1200 * MB, "immediate", 1, 1.2)])
    by_hift, by_badam = (
        f"HELD sweep at most 0.33 of {name}, within its {need} MB" for name, need in ((HIFT[0], "1140.0"), (BADAM[0], "1130.0"))
    )
    assert aims[by_hift] == Aim(by_hift, "0.24", True)
    assert aims[by_badam] == Aim(by_badam, "0.36", False)
    assert [aim.found for text, aim in aims.items() if text.startswith("IMMEDIATE")] == ["no plan in these bytes was measured"] * 2
    assert [aim.met for text, aim in aims.items() if text.startswith("a budget that")] == [True, False]
    assert [aim.found for text, aim in aims.items() if text.startswith("AdamW for every")] == ["the smallest peak with T = 1 is 1200.0 MB"]


def test_a_refused_budget_is_neither_a_time_nor_a_peak() -> None:
    refused = Row(Entry("ours", 12, 600 * MB, "held"), Refusal(700 * MB), None)
    assert str(refused.peak) == "refused: the smallest budget is 700.0 MB"
    assert [aim.met for aim in judge(RIVALS, [refused])] == [False] * 5
