"""Whatever rows were kept together, the same rows come back together in another way."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkft_compile.runtime.archive import CheckpointError, Entry
from chunkft_compile.runtime.rows import Cut, Reslicing, Span, sources


@st.composite
def divisions(draw: st.DrawFn, sizes: dict[str, int]) -> list[Span]:
    """Every parameter cut somewhere."""
    spans = []
    for param, size in sizes.items():
        bounds = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
        spans += [Span(param, start, stop) for start, stop in pairwise(bounds)]
    return spans


SIZES = {"a.weight": 12, "b[0].weight": 7, "c": 1}


@given(divisions(SIZES), divisions(SIZES))
def test_cuts_join_to_the_rows(wanted: list[Span], kept: list[Span]) -> None:
    whole = {param: torch.arange(size) for param, size in SIZES.items()}
    tensors = {str(span): whole[span.param][span.start : span.stop] for span in kept}
    for span, cuts in sources(wanted, kept).items():
        joined = torch.cat([tensors[cut.source][cut.start : cut.stop] for cut in cuts])
        assert torch.equal(joined, whole[span.param][span.start : span.stop])


@given(divisions(SIZES), divisions(SIZES))
def test_recipes_of_rows_are_their_cuts_and_of_equal_counters_a_name(wanted: list[Span], kept: list[Span]) -> None:
    values = {str(span): {"m": Entry("float32", (span.stop - span.start, 3), ()), "step": Entry("float32", (), ())} for span in kept}
    reslicing = Reslicing(values, lambda chunk, key: 4.0)
    for span, cuts in sources(wanted, kept).items():
        recipes = reslicing.recipes(span, cuts)
        if str(span) in values:
            assert recipes == {"m": str(span), "step": str(span)}
        else:
            assert recipes == {"m": cuts, "step": cuts[0].source}
    assert not reslicing.uneven


def test_names() -> None:
    assert str(Span.parse("blocks[2].weight[3:9]")) == "blocks[2].weight[3:9]"
    assert Span.parse("blocks[2].weight[3:9]") == Span("blocks[2].weight", 3, 9)


def test_rows_that_are_missing() -> None:
    with pytest.raises(CheckpointError, match="trains 4 rows of w, here it is 8"):
        sources([Span("w", 0, 8)], [Span("w", 0, 4)])
    with pytest.raises(CheckpointError, match=r"does not have all rows of w\[0:8\]"):
        sources([Span("w", 0, 8)], [Span("w", 0, 2), Span("w", 4, 8)])


def _halves(key: str, *values: object) -> Reslicing:
    numbers = {"w[0:4]": 5.0, "w[4:8]": 6.0, "w[8:12]": 8.0}
    names = list(numbers)[: len(values)]
    return Reslicing({name: {key: value} for name, value in zip(names, values, strict=True)}, lambda chunk, key: numbers[chunk])


CUTS = (Cut("w[0:4]", 0, 4), Cut("w[4:8]", 0, 4), Cut("w[8:12]", 0, 4))
SCALAR = Entry("float32", (), ())


def test_counters_one_apart_go_on_with_the_larger() -> None:
    reslicing = _halves("step", SCALAR, SCALAR)
    assert reslicing.recipes(Span("w", 0, 8), CUTS[:2]) == {"step": "w[4:8]"}
    assert reslicing.uneven == ["w[0:8] (5 and 6 times)"]
    plain = _halves("step", 6, 5)
    assert plain.recipes(Span("w", 0, 8), CUTS[:2]) == {"step": "w[0:4]"}


def test_other_differences_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"step of w\[0:12\] would be joined of different values \(5.0, 8.0\)"):
        _halves("step", SCALAR, SCALAR, SCALAR).recipes(Span("w", 0, 12), CUTS)
    with pytest.raises(CheckpointError, match="mu_product of"):
        _halves("mu_product", SCALAR, SCALAR).recipes(Span("w", 0, 8), CUTS[:2])
    with pytest.raises(CheckpointError, match="belongs to whole chunks, not to rows"):
        _halves("column", Entry("float32", (1, 3), ()), Entry("float32", (1, 3), ())).recipes(Span("w", 0, 8), CUTS[:2])
    with pytest.raises(CheckpointError, match=r"w\[0:8\] joins rows with different optimizer state: w\[4:8\] has none"):
        Reslicing({"w[0:4]": {"m": Entry("float32", (4, 3), ())}, "w[4:8]": {}}, lambda chunk, key: 0.0).recipes(Span("w", 0, 8), CUTS[:2])
