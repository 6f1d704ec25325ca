"""Who is told what happens in a run. Whatever watches a run step by step is a `Listener` here or beside (`tensorboard`).

The loop knows one callable that takes events; `fine_tune` makes it of all listeners.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, Self

from tqdm import tqdm

from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.events import Evaluated, Event, Planned, StepDone
from chunkft_compile.cli.options import bar_style, discard_stdout
from chunkft_compile.cli.planned import say

Tell = Callable[[Event], None]


class Listener(Protocol):
    """Is told every event, in order; `close` comes once, also after an error."""

    def hear(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Listeners:
    """All of them, as one to tell; a context manager that closes them."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._session = ExitStack()

    def __enter__(self) -> Self:
        for listener in self._listeners:
            self._session.callback(listener.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    def __call__(self, event: Event) -> None:
        for listener in self._listeners:
            listener.hear(event)


class Bar:
    """The progress bar, and a line for each evaluation; on stderr, for people. It appears with the first step of this process."""

    def __init__(self) -> None:
        self._budget_nbytes = 0
        self._bar: Any = None

    def hear(self, event: Event) -> None:
        """See `Listener`."""
        if isinstance(event, Planned):
            self._budget_nbytes = event.budget_nbytes
        elif isinstance(event, StepDone):
            if self._bar is None:
                self._bar = tqdm(total=event.steps, initial=event.step - 1, desc="train", unit="step", **bar_style())
            self._bar.set_postfix_str(live_line(event, self._budget_nbytes), refresh=False)
            self._bar.update()
        elif isinstance(event, Evaluated) and event.best_step is not None:
            best = "the best so far" if event.without_best == 0 else f"the best is that of step {event.best_step}"
            say(f"step {event.step}: held-out perplexity {event.perplexity:.2f}, {best}")

    def close(self) -> None:
        """See `Listener`."""
        if self._bar is not None:
            self._bar.close()


class JsonLines:
    """One JSON object a line on stdout."""

    def hear(self, event: Event) -> None:
        """See `Listener`."""
        try:
            print(json.dumps(event.to_plain()), flush=True)
        except BrokenPipeError:
            # hours of training are worth more than a reader that left
            discard_stdout()
            say("nobody reads the output of --json any more; the run goes on")

    def close(self) -> None:
        """See `Listener`."""


def live_line(event: StepDone, budget_nbytes: int) -> str:
    """Where the run is and what it takes, in one line. The prediction is this step's; what is measured is the most so far."""
    parts = [
        f"loss {event.loss:.3f}",
        f"step {event.sweep_step + 1}/{event.sweep_steps} of sweep {event.sweep + 1}",
        f"{event.active_chunks} active chunks",
        f"predicted {format_nbytes(event.predicted_nbytes)} of {format_nbytes(budget_nbytes)}",
    ]
    if event.measured_nbytes is not None:
        parts.append(f"measured {format_nbytes(event.measured_nbytes)}")
    if event.process_nbytes is not None:
        parts.append(f"process {format_nbytes(event.process_nbytes)}")
    return ", ".join(parts)
