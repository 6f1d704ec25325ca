"""What is held out: its score, and what the scores so far say about going on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from chunkft_compile.sequences import IGNORED, Sequences


@dataclass(frozen=True)
class Score:
    """The mean loss of all labelled tokens that are held out, after `step` optimizer steps."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))  # above, exp() leaves the range of a float


@dataclass
class History:
    """What a run has seen so far, all of which is kept in checkpoints: the loss of each step, and the scores of `--eval-every`."""

    losses: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    @property
    def best(self) -> Score | None:
        """The lowest loss; of equal ones, the first."""
        return min(self.scores, key=lambda score: score.loss, default=None)

    @property
    def without_best(self) -> int:
        """Evaluations since the best one."""
        return 0 if self.best is None else len(self.scores) - 1 - self.scores.index(self.best)

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": self.losses, "scores": [(score.step, score.loss) for score in self.scores]}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "History":
        """The opposite of `to_plain`."""
        return History(list(plain["losses"]), [Score(step, loss) for step, loss in plain["scores"]])


@dataclass(frozen=True)
class Evaluation:
    """When a run is scored, and by what: every `every` steps (0: never) and after the last of `steps`.

    `patience` is how many evaluations in a row may be no better than the best (0: any number).
    """

    score: Callable[[int], Score | None]
    every: int
    patience: int
    steps: int

    def is_due(self, history: History) -> bool:
        """Whether the last step is one to score, and is not scored yet."""
        step = history.step
        scored = bool(history.scores) and history.scores[-1].step == step
        return bool(self.every and step and not scored) and (step % self.every == 0 or step == self.steps)

    def is_over(self, history: History) -> bool:
        """Whether the run has waited long enough for a better score."""
        return bool(self.patience) and history.without_best >= self.patience


@torch.no_grad()
def mean_loss(
    model: Any, held_out: Sequences, device: torch.device, *, batch: int, what: str, stopped: Callable[[], object] = lambda: None
) -> float | None:
    """The mean loss over all labelled tokens of `held_out`; None if `stopped()` before the end."""
    was_training = model.training
    model.eval()
    losses: list[tuple[float, int]] = []
    try:
        # disable=None: no bar in a log, where it could not be taken away again
        for start in tqdm(range(0, len(held_out), batch), desc=what, unit="batch", leave=False, disable=None):
            if stopped():
                return None
            inputs = {name: tensor.to(device) for name, tensor in held_out.take(slice(start, start + batch)).items()}
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())  # the first token is never predicted
            losses.append((float(model(**inputs).loss), count))
    finally:
        model.train(was_training)
    return _mean(losses)


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """Every token weighs the same."""
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss of what is held out is {mean}: lower --lr or raise --warmup; nothing was saved")
    return mean
