"""What happens in a run, one class for each kind of event. `--json` writes them as they are: `event` is the name, the rest are the fields.

Bytes are those of the model's device, times are seconds, steps are optimizer steps counted from 1; 0 is before the first.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that listeners are told."""

    event: ClassVar[str]

    def to_plain(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """The model is planned. `plain_nbytes` is the computed peak of plain training; `step` steps are done already, where a run is resumed.

    `sequences` and `held_out` are numbers of sequences, `config` is the complete configuration.
    """

    event = "plan"
    budget_nbytes: int
    predicted_nbytes: int
    plain_nbytes: int
    sweep_steps: int
    step: int
    steps: int
    sequences: int
    held_out: int
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """An optimizer step is done. `sweep` counts from 0, `sweep_step` from 0 to `sweep_steps` - 1, as in `ChunkedModule.progress`.

    `loss` is the mean of the step's batches, `grad_norm` that of the active chunks before clipping (None: no clipping).
    `predicted_nbytes` is the peak planned for this step, `measured_nbytes` the most that was measured so far (None: nothing),
    `process_nbytes` what the process holds in memory (None: the system does not tell).
    """

    event = "step"
    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int
    seconds: float
    sweep: int
    sweep_step: int
    sweep_steps: int
    active_chunks: int
    predicted_nbytes: int
    measured_nbytes: int | None
    process_nbytes: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """What is held out was scored after `step`: mean `loss` of its labelled tokens and `perplexity`, its exp.

    `best_step` is that of the best evaluation so far and `without_best` how many followed it; None and 0 outside of `--eval-every`.
    """

    event = "eval"
    step: int
    loss: float
    perplexity: float
    best_step: int | None = None
    without_best: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """Everything that the run goes on from after `step` is at `path`."""

    event = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """Training ended before its last step: `reason` is "patience", "SIGINT" or "SIGTERM".

    After a signal there is the `checkpoint` to go on from, and `command` that does it (None where the run was started from Python).
    """

    event = "stopped"
    reason: str
    step: int
    checkpoint: str | None = None
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """The model is complete at `path`, after `step` steps of training.

    Perplexities are None where nothing is held out, the first one also in a resumed run.
    """

    event = "saved"
    step: int
    path: str
    perplexity_before: float | None
    perplexity_after: float | None
