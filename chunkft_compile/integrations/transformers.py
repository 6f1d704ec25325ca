"""The Trainer of transformers, for a compiled model.

    from chunkft_compile.integrations.transformers import ChunkedTrainer

    model = chunkft_compile.compile(model, budget="14GB")
    trainer = ChunkedTrainer(model=model, args=TrainingArguments("out", save_steps=100), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)

`ChunkedSeq2SeqTrainer` is the same for `Seq2SeqTrainer`, `chunkft_compile.integrations.trl.ChunkedSFTTrainer` for TRL's, and any other
trainer takes the mixin: `class MyTrainer(ChunkedTrainerMixin, SomeTrainer)`. The training loop is theirs.

What the mixin adds:

- Every log has the position in the sweep, the active chunks, and predicted and measured peaks beside the budget (`chunkft/...`).
- A checkpoint holds the model as `save_pretrained` writes it, and under `chunkft/` the optimizer state by chunk and the place in the
  sweep. `resume_from_checkpoint` goes on bit by bit.
- `weight_decay` reaches the chunks of the parameters that the Trainer decays.
- Arguments that cannot work with chunks are refused by name, and a run that ends before its first sweep warns.

These are methods and not a `TrainerCallback` because no callback can do them: reporters read the log before callbacks of the user may add
to it, parameters are matched by names before any callback knows the optimizer, and no callback is told the checkpoint to resume from.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from chunkft_compile.checkpoints import load_checkpoint, save_checkpoint
from chunkft_compile.errors import CheckpointError
from chunkft_compile.integrations.trainer_checks import refuse_arguments, refuse_for_model, short_sweep
from chunkft_compile.module import ChunkedModule, Progress
from chunkft_compile.planner import Schedule, Update

_FOLDER = "chunkft"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ChunkedTrainerMixin(_Base):
    """What a trainer class lacks for compiled models; stands before it in the list of bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, TrainingArguments):
                refuse_arguments(given)  # before the trainer acts on them
        super().__init__(*args, **kwargs)
        refuse_arguments(self.args)
        refuse_for_model(self.args, self._chunked, scaler=getattr(self.accelerator, "scaler", None))
        self._last: Progress | None = None
        self._predicted_nbytes = 0  # the most since the last log
        self._checked: Schedule | None = None

    @property
    def _chunked(self) -> ChunkedModule:
        if not isinstance(self.model, ChunkedModule):
            raise TypeError(
                f"{type(self).__name__} trains what chunkft_compile.compile() gave, and this is a {type(self.model).__name__}; compile it "
                f"first, or take the trainer without chunks"
            )
        return self.model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The chunks of the parameters that are decayed: as the Trainer would choose, by the modules and names of the model itself."""
        if not isinstance(model, ChunkedModule):
            names: list[str] = super().get_decay_parameter_names(model)
            return names
        whole = {*super().get_decay_parameter_names(model.module)}
        return [chunk.name for chunk in model.chunks if chunk.param in whole]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, and remember the step for the log."""
        loss = super().training_step(*args, **kwargs)
        self._last = self._chunked.progress
        self._predicted_nbytes = max(self._predicted_nbytes, self._last.predicted_nbytes)
        schedule = self._chunked.schedule
        if schedule is not self._checked:
            self._checked = schedule
            if text := short_sweep(self._chunked, self.state.max_steps - self.state.global_step):
                warnings.warn(text, stacklevel=2)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """None where backward has applied the gradients already: nobody knows the norm of all."""
        current = self._chunked._session.planned.current
        if current.update is Update.IMMEDIATE:
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with what chunks were trained in what memory beside a training loss."""
        if self._last is not None and "loss" in logs:
            logs |= self._figures(self._last)
        super().log(logs, *args, **kwargs)

    def _figures(self, last: Progress) -> dict[str, float]:
        measured_nbytes = self._chunked._session.guard.take_peak()
        figures: dict[str, float] = {
            "chunkft/sweep": last.sweep + (last.step + 1) / last.steps,
            "chunkft/steps_per_sweep": last.steps,
            "chunkft/active_chunks": len(last.active),
            "chunkft/predicted_nbytes": self._predicted_nbytes,
            "chunkft/budget_nbytes": self._chunked.budget_nbytes,
        }
        self._predicted_nbytes = 0
        return figures if measured_nbytes is None else figures | {"chunkft/measured_nbytes": measured_nbytes}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """In place of `optimizer.pt`, which knows no sweep, and is read as a whole onto the device."""
        if self.args.should_save:
            folder = Path(output_dir, _FOLDER)
            save_checkpoint(folder, self._chunked, self._inner_optimizer, scheduler=self.lr_scheduler, keep=1, weights=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The opposite; the Trainer has loaded the weights before."""
        if checkpoint is None:
            return
        folder = Path(checkpoint, _FOLDER)
        if folder.is_dir():
            load_checkpoint(folder, self._chunked, self._inner_optimizer, scheduler=self.lr_scheduler)
        elif Path(checkpoint, OPTIMIZER_NAME).exists():
            raise CheckpointError(
                f"{checkpoint} has an {OPTIMIZER_NAME} and no {_FOLDER}/: a trainer without chunks wrote it, whose optimizer state does "
                f"not say which rows it is of; start from its weights (from_pretrained) without resume_from_checkpoint"
            )
        else:
            warnings.warn(
                f"{checkpoint} holds weights only (save_only_model): optimizer state, learning rate and sweep start anew", stacklevel=2
            )

    @property
    def _inner_optimizer(self) -> Optimizer:
        """The one that accelerate wraps."""
        found: Any = self.optimizer
        while isinstance(inner := getattr(found, "optimizer", None), Optimizer):
            found = inner
        assert isinstance(found, Optimizer), "the Trainer makes its optimizer before it saves or loads"
        return found


class ChunkedTrainer(ChunkedTrainerMixin, Trainer):
    """`transformers.Trainer` for a compiled model."""


class ChunkedSeq2SeqTrainer(ChunkedTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for a compiled model."""
