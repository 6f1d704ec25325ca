"""TRL's `SFTTrainer`, for a compiled model.

    from chunkft_compile.integrations.trl import ChunkedSFTTrainer

    model = chunkft_compile.compile(model, budget="14GB")
    args = SFTConfig("out", activation_checkpointing=False)
    trainer = ChunkedSFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)

See `chunkft_compile.integrations.transformers` for what it logs, keeps and refuses. The loss is the model's own. TRL would call the
backbone and the weight of the head by themselves, to keep [tokens, vocabulary] from memory; a plan tiles the head where the budget asks
for it. So the logs have no `entropy` and no `mean_token_accuracy`.
"""

from typing import Any

from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

from chunkft_compile.integrations.transformers import ChunkedTrainerMixin


class ChunkedSFTTrainer(ChunkedTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for a compiled model. `loss_type="dft"` needs the probability of every token, which it refuses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        loss_type: str = getattr(self.args, "loss_type", "nll")
        if loss_type != "nll":
            raise ValueError(
                f'loss_type={loss_type!r} cannot train a compiled model: the loss is its own cross entropy; pass "nll", or '
                f"a compute_loss_func over its logits to a ChunkedTrainer"
            )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer.compute_loss`, past that of `SFTTrainer`."""
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *args, **kwargs)
