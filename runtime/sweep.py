"""The position in the schedule: which step comes next, and which chunks the current sweep has trained."""

from dataclasses import dataclass, replace

from chunkft_compile.planner.problem import Schedule, Step


@dataclass(frozen=True)
class SweepState:
    """A position in a sweep, to be kept: sweeps done, chunks trained in this one, chunks of the current step that were stepped
    already (by one of two optimizers), and the steps left, the current one first.
    """

    count: int = 0
    trained: frozenset[int] = frozenset()
    stepped: frozenset[int] = frozenset()
    steps: tuple[Step, ...] = ()


class Sweep:
    """Goes round the steps of a schedule; every chunk is trained once per round, also when the schedule changes in between."""

    def __init__(self, schedule: Schedule, count: int = 0) -> None:
        self.schedule = schedule
        self.count = count
        self._steps = list(schedule.steps)
        self._trained: set[int] = set()
        self._stepped: set[int] = set()

    @property
    def current(self) -> Step:
        """The step that is trained now."""
        return self._steps[0]

    @property
    def position(self) -> int:
        """Steps of this round already done, counted from the end so that a changed schedule still ends at its last step."""
        return max(0, len(self.schedule.steps) - len(self._steps))

    @property
    def state(self) -> SweepState:
        """The position, as `at` and `after` take it."""
        return SweepState(self.count, frozenset(self._trained), frozenset(self._stepped), tuple(self._steps))

    @classmethod
    def at(cls, schedule: Schedule, state: SweepState) -> "Sweep":
        """Exactly this position under the schedule it was taken from."""
        found = cls(schedule, state.count)
        found._steps, found._trained, found._stepped = list(state.steps), set(state.trained), set(state.stepped)
        return found

    @classmethod
    def after(cls, schedule: Schedule, state: SweepState) -> "Sweep":
        """The same round under another schedule: its steps without the chunks that were trained already."""
        following = cls(schedule, state.count)
        following._trained = {*state.trained, *state.stepped}  # also those that one of two optimizers has stepped already
        following._steps = following._without(following._trained) or list(schedule.steps)
        return following

    def stepped(self, numbers: frozenset[int]) -> bool:
        """Chunks were stepped by their optimizer. True when the step is complete and the next one has begun."""
        self._stepped |= numbers
        if not set(self.current.chunks) <= self._stepped:
            return False
        self._trained |= self._stepped
        self._stepped = set()
        self._steps.pop(0)
        if not self._steps:
            self._steps = list(self.schedule.steps)
            self._trained = set()
            self.count += 1
        return True

    def continued(self, schedule: Schedule) -> "Sweep":
        """The same round under another schedule: its steps without the chunks that were trained already."""
        return Sweep.after(schedule, self.state)

    def resumed(self) -> "Sweep":
        """The same round after an error broke off a step that was updated chunk by chunk: without the chunks that were."""
        return self.continued(self.schedule) if self._stepped else self

    def with_current(self, chunks: tuple[int, ...], options: tuple[str, ...]) -> "Sweep":
        """The same round, with these chunks next and the rest after them."""
        following = Sweep(self.schedule, self.count)
        following._trained = (self._trained | self._stepped) - set(chunks)
        first = replace(self.current, chunks=tuple(sorted(chunks)), options=options)
        following._steps = [first, *following._without(following._trained | set(chunks))]
        return following

    def _without(self, trained: set[int]) -> list[Step]:
        steps = []
        for step in self.schedule.steps:
            left = tuple(number for number in step.chunks if number not in trained)
            if left:
                steps.append(replace(step, chunks=left))
        return steps
