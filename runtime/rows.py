"""From the row ranges that a checkpoint was written under to those of now: where every tensor of every chunk comes from.

Everything is decided here, from names, shapes and one-element values, before a byte of a model is changed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chunkft_compile.runtime.archive import CheckpointError, Entry

_COUNTER = "step"  # what every torch.optim optimizer calls its step counter
Value = Entry | Any
"""A tensor in the checkpoint, or a plain value."""


@dataclass(frozen=True, order=True)
class Span:
    """Rows `[start, stop)` of a parameter; the name of a chunk says just that."""

    param: str
    start: int
    stop: int

    @classmethod
    def parse(cls, name: str) -> "Span":
        """From `fqn[start:stop]`."""
        param, _, rows = name.rpartition("[")
        start, _, stop = rows.removesuffix("]").partition(":")
        return cls(param, int(start), int(stop))

    def __str__(self) -> str:
        return f"{self.param}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Cut:
    """Rows `[start, stop)` of what the checkpoint has for the chunk `source`, counted from that chunk's first row."""

    source: str
    start: int
    stop: int


Recipe = tuple[Cut, ...] | str
"""How one value of a chunk is made: of rows joined in this order, or taken as it is from the chunk with this name."""


def sources(wanted: Sequence[Span], kept: Iterable[Span]) -> dict[Span, tuple[Cut, ...]]:
    """The rows of `kept` that make up each of `wanted`. Raises `CheckpointError` unless both cover the same rows."""
    by_param: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(kept):
        by_param[span.param].append(span)
    _check_sizes(wanted, by_param)
    found = {}
    for span in wanted:
        meeting = [old for old in by_param[span.param] if old.start < span.stop and span.start < old.stop]
        cuts = [Cut(str(old), max(old.start, span.start) - old.start, min(old.stop, span.stop) - old.start) for old in meeting]
        if sum(cut.stop - cut.start for cut in cuts) != span.stop - span.start:
            raise CheckpointError(f"the checkpoint does not have all rows of {span}")
        found[span] = tuple(cuts)
    return found


def _check_sizes(wanted: Sequence[Span], kept: Mapping[str, Sequence[Span]]) -> None:
    here: dict[str, int] = defaultdict(int)
    for span in wanted:
        here[span.param] = max(here[span.param], span.stop)
    there = {param: spans[-1].stop for param, spans in kept.items()}
    for param in sorted(here.keys() | there.keys()):
        if here.get(param) != there.get(param):
            raise CheckpointError(
                f"the checkpoint trains {there.get(param, 0)} rows of {param}, here it is {here.get(param, 0)}: "
                f"freeze and train the same parameters"
            )


class Reslicing:
    """Recipes for the values (optimizer state, ...) of new chunks from those of kept ones.

    `values[chunk][key]` is what the checkpoint has; `scalar(chunk, key)` reads a tensor of one element. `uneven`
    are the chunks so far whose rows were trained a different number of times; they go on with the larger one.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Value]], scalar: Callable[[str, str], float]) -> None:
        self.uneven: list[str] = []
        self._values = values
        self._scalar = scalar
        spans = {chunk: Span.parse(chunk) for chunk in values}
        parts = Counter(span.param for span in spans.values())
        divided = [chunk for chunk, span in spans.items() if parts[span.param] > 1 or span.stop > 1]  # a lone row is never cut
        self._unaligned = {key for chunk in divided for key, value in values[chunk].items() if not _aligned(value, spans[chunk])}

    def recipes(self, wanted: Span, cuts: Sequence[Cut]) -> dict[str, Recipe]:
        """A recipe for every value of a chunk. Raises `CheckpointError` for what cannot be cut or joined."""
        if len(cuts) == 1 and str(wanted) == cuts[0].source:
            return dict.fromkeys(self._values.get(cuts[0].source, {}), cuts[0].source)
        states = [self._values.get(cut.source, {}) for cut in cuts]
        for cut, state in zip(cuts, states, strict=True):
            if state.keys() != states[0].keys():
                fewer = min((state, states[0]), key=len)
                other = cut.source if fewer is state else cuts[0].source
                raise CheckpointError(
                    f"{wanted} joins rows with different optimizer state: {other} has {', '.join(fewer) or 'none, it was never trained'}; "
                    f"resume under the budget of the checkpoint until a whole sweep is done"
                )
        return {key: self._recipe(wanted, key, cuts) for key in states[0]}

    def _recipe(self, wanted: Span, key: str, cuts: Sequence[Cut]) -> Recipe:
        if key not in self._unaligned:
            return tuple(cuts)
        values = [self._values[cut.source][key] for cut in cuts]
        if any(isinstance(value, Entry) and value.numel != 1 for value in values):
            raise CheckpointError(
                f"the optimizer state {key} of {wanted.param} belongs to whole chunks, not to rows, and the chunks are others here "
                f"({wanted}, made of {cuts[0].source}, ...): resume under the budget of the checkpoint"
            )
        numbers = [self._scalar(cut.source, key) if isinstance(v, Entry) else v for cut, v in zip(cuts, values, strict=True)]
        if all(number == numbers[0] for number in numbers):
            return cuts[0].source
        if key == _COUNTER and max(numbers) - min(numbers) <= 1:
            # In the middle of a sweep a part of the rows has had one step more than the others.
            self.uneven.append(f"{wanted} ({min(numbers):g} and {max(numbers):g} times)")
            return cuts[numbers.index(max(numbers))].source
        raise CheckpointError(
            f"the optimizer state {key} of {wanted} would be joined of different values ({min(numbers)}, {max(numbers)}): "
            f"resume under the budget of the checkpoint"
        )


def _aligned(value: Value, span: Span) -> bool:
    """Whether a value has a row for every row of its chunk."""
    return isinstance(value, Entry) and bool(value.shape) and value.shape[0] == span.stop - span.start
