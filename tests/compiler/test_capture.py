"""Capture: what comes out of the joint graph, what is refused with which words, and what leaves no trace."""

import gc
import logging
from typing import Any

import pytest
import torch
from torch import fx, nn

from chunkft_compile.capture import Capture, Dropped, capture
from chunkft_compile.errors import CaptureError
from tests import models
from tests.compiler.joint import captured

logger = logging.getLogger("user")


class Base(nn.Module):
    """One weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y.sum()


def _capture(model: nn.Module, *args: Any, **kwargs: Any) -> Capture:
    return capture(model.train(), args, kwargs)


def test_gradients_and_placeholders_have_the_names_of_the_model() -> None:
    found = captured("llama")
    model = next(case for case in models.CASES if case.name == "llama").build()
    assert set(found.gradients) == set(dict(model.named_parameters()))
    assert set(found.params.values()) == set(found.gradients)
    assert set(found.buffers.values()) <= set(dict(model.named_buffers()))
    for name, node in found.gradients.items():
        assert node.meta["val"].shape == model.get_parameter(name).shape


def test_tied_parameters_come_once() -> None:
    found = captured("llama-tied")
    assert "lm_head.weight" not in found.gradients
    assert "lm_head.weight" not in found.params.values()  # whatever name forward used, it is the first one
    assert "model.embed_tokens.weight" in found.gradients


def test_frozen_parameters_have_no_gradient() -> None:
    model = models.Mlp()
    model.middle.requires_grad_(False)
    found = _capture(model, torch.randn(2, 6))
    assert sorted(found.gradients) == ["enter.bias", "enter.weight", "leave.bias", "leave.weight"]
    assert "middle.weight" in found.params.values()


def test_only_the_loss_is_kept_and_reading_the_rest_says_so() -> None:
    found = captured("llama")
    assert len(found.outputs) == 1
    output = found.rebuild([torch.tensor(1.5)])
    assert output.loss == 1.5
    assert list(output.keys()) == ["loss"]
    assert isinstance(output.logits, Dropped)
    assert repr(output.logits) == "<logits: not kept while training>"
    with pytest.raises(AttributeError, match=r"output 'logits' is not kept while training.*outputs=\"all\"\) keeps it"):
        output.logits.argmax(-1)


def test_all_outputs_can_be_kept() -> None:
    case = next(case for case in models.CASES if case.name == "llama")
    args, kwargs = case.arguments()
    found = capture(case.build(), args, kwargs | {"use_cache": False}, loss_only=False)
    shapes = [leaf.meta["val"].shape for leaf in found.outputs if isinstance(leaf, fx.Node)]
    assert shapes == [(), (2, models.TOKENS, models.VOCABULARY)]
    assert found.rebuild([torch.tensor(1.5), torch.zeros(3)]).logits.shape == (3,)


def test_dictionaries_and_nested_arguments() -> None:
    class Nested(Base):
        def forward(self, batch: dict[str, Any], *, scale: float, flag: bool = False) -> dict[str, torch.Tensor]:
            y = self.inner(batch["x"]) * batch["more"][0] * scale
            return {"loss": y.sum(), "flagged": y if flag else -y}

    x, more = torch.randn(3, 4), torch.randn(3, 4)
    found = _capture(Nested(), {"x": x, "more": [more, "text"]}, scale=2.0)
    assert sorted(found.inputs.values()) == [0, 1]
    rebuilt = found.rebuild([torch.tensor(2.0)])
    assert rebuilt["loss"] == 2.0
    assert isinstance(rebuilt.get("flagged", Dropped("flagged")), Dropped)


def test_labels_may_be_the_very_tensor_of_the_inputs() -> None:
    assert sorted(captured("llama").inputs.values()) == [0, 1]


def test_changed_buffers_are_mutations() -> None:
    class Normed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(self.inner(x))
            return y.square().sum()

    model = Normed()
    found = _capture(model, torch.randn(3, 4))
    assert sorted(found.mutations) == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    assert model.norm.num_batches_tracked == 0  # tracing changes nothing


def test_logging_in_forward_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    class Talking(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logger.warning("shape %s", x.shape)
            return self.total(x)

    found = _capture(Talking(), torch.randn(3, 4))
    assert sorted(found.gradients) == ["inner.bias", "inner.weight"]
    assert not [record for record in caplog.records if record.name == "user"]


def test_an_error_names_file_line_and_operation() -> None:
    class Reading(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.total(x)
            return y * 2 if y.item() > 0 else y  # reads a value

    with pytest.raises(CaptureError) as caught:
        _capture(Reading(), torch.randn(3, 4))
    message = str(caught.value)
    assert "cannot capture Reading as one graph at" in message
    assert f"{__file__}:{Reading.forward.__code__.co_firstlineno + 2}" in message
    assert "reads a value" in message
    assert "way out: " in message


def test_data_dependent_sizes_are_refused_with_the_line() -> None:
    class Choosing(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y[x[:, 0] > 0].sum()  # boolean index

    with pytest.raises(CaptureError, match=r"(?s)test_capture\.py.*boolean index|depends on the data.*boolean index"):
        _capture(Choosing(), torch.randn(3, 4))


def test_checkpointing_inside_is_no_obstacle() -> None:
    class Checkpointed(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
            return y.sum()

    found = _capture(Checkpointed(), torch.randn(3, 4))
    assert sorted(found.gradients) == ["inner.bias", "inner.weight"]


def test_the_batch_is_not_kept() -> None:
    model, x = models.Mlp(), torch.randn(5, 6)
    address = x.data_ptr()
    found = _capture(model, x)
    del x
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.device.type == "cpu" and o.data_ptr() == address]
    assert alive == []
    assert found.gradients


def test_the_model_is_untouched() -> None:
    model = models.Mlp().train()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    capture(model, (torch.randn(3, 6),), {})
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) and p.grad is None for name, p in model.named_parameters())
    assert model.training
