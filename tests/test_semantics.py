"""Models as people write them: what they take and give, what is already in them. Each is trained and held against autograd."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import chunkft_compile
from benchmarks.common import Batch
from benchmarks.zoo import ZOO, Entry
from benchmarks.zoo.trial import attempt

pytestmark = pytest.mark.usefixtures("captures_once")

LLAMA = next(entry for entry in ZOO if entry.name == "Llama")


def _squares(output: Any) -> torch.Tensor:
    value: torch.Tensor = output["logits"] if isinstance(output, dict) else output
    return value.square().mean()


def _works(entry: Entry) -> None:
    outcome = attempt(entry, None)
    assert not outcome.refused
    assert outcome.works, outcome


class _Flexible(nn.Module):
    """Takes a dict or an object with tensors in it, a flag and a mask of booleans; gives a dict that also has a number in it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, batch: Any, *, flag: bool = True, mask: torch.Tensor | None = None, index: torch.Tensor | None = None) -> Any:
        """[rows, 8] -> [rows, 3]."""
        y = self.enter(batch["x"] if isinstance(batch, dict) else batch.x)
        if flag:
            y = torch.relu(y)
        if mask is not None:
            y = torch.where(mask[:, None], y, -y)
        if index is not None:
            y = y[index]
        return {"logits": self.leave(y), "count": 3}


@dataclasses.dataclass
class _Batch:
    x: torch.Tensor


def _dict_batch() -> Batch:
    batch: dict[str, Any] = {"batch": {"x": torch.randn(4, 8)}, "flag": True, "mask": torch.tensor([True, False, True, True])}
    return batch


def _object_batch() -> Batch:
    batch: dict[str, Any] = {"batch": _Batch(torch.randn(4, 8)), "flag": False, "index": torch.tensor([3, 0, 0, 1])}
    return batch


@pytest.mark.parametrize("batch", [_dict_batch, _object_batch])
def test_inputs_and_outputs_of_many_types(batch: Callable[[], Batch]) -> None:
    _works(Entry("flexible", "", _Flexible, batch, _squares))


class _TwoLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two scalars."""
        h = self.a(x).tanh()
        return h.square().mean(), self.b(h).abs().mean()


def _vectors() -> Batch:
    return {"x": torch.randn(4, 8)}


def test_several_losses_weighed_outside() -> None:
    _works(Entry("two losses", "", _TwoLosses, _vectors, lambda losses: losses[0] + 2 * losses[1]))


class _Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.b = parametrizations.orthogonal(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through both."""
        result: torch.Tensor = self.b(self.a(x).tanh())
        return result


def test_parametrizations() -> None:
    """Spectral norm puts other tensors in the places of its buffers, which a graph cannot do, and that is said."""
    with pytest.warns(UserWarning, match=r"changes Python state \(.*parametrizations.*_buffers.*training steps will not change it"):
        _works(Entry("parametrized", "", _Parametrized, _vectors, _squares))


class _Checkpointed(nn.Module):
    """One layer twice, each time under torch.utils.checkpoint, with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice."""
        for _ in range(2):
            x = checkpoint(lambda y: self.drop(self.layer(y).tanh()), x, use_reentrant=False)
        return x


def test_checkpointing_of_torch_with_dropout() -> None:
    _works(Entry("checkpointed", "", _Checkpointed, _vectors, _squares))


deprecated = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the name that everybody still uses


@deprecated
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_checkpointing_of_transformers(*, reentrant: bool) -> None:
    def build() -> nn.Module:
        model: Any = LLAMA.build()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return model  # type: ignore[no-any-return]

    _works(replace(LLAMA, build=build))


def test_a_frozen_embedding() -> None:
    def build() -> nn.Module:
        model = LLAMA.build()
        model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
        return model

    _works(replace(LLAMA, build=build))


@deprecated
@pytest.mark.parametrize("everything", [pytest.param(True, marks=pytest.mark.slow), False])
def test_adapters_of_peft(*, everything: bool) -> None:
    peft = pytest.importorskip("peft")

    def build() -> nn.Module:
        model: nn.Module = peft.get_peft_model(LLAMA.build(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        return model.requires_grad_(True) if everything else model

    _works(replace(LLAMA, build=build))


class _Hooked(_Flexible):
    """For hooks, which are no part of what the tests tell models by that share a capture."""


def test_hooks_of_forward_are_traced() -> None:
    def build() -> nn.Module:
        model = _Hooked()
        model.enter.register_forward_hook(lambda module, args, output: output * 2)
        model.leave.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        return model

    _works(Entry("hooked", "", build, _dict_batch, _squares))


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda model: model.enter.weight.register_hook(lambda g: g), r"enter\.weight has a hook on its gradient \(register_hook or"),
        (lambda model: model.leave.bias.register_post_accumulate_grad_hook(lambda p: None), r"leave\.bias has a hook on its gradient"),
        (lambda model: model.enter.register_full_backward_hook(lambda m, i, o: None), r"enter \(Linear\) has a backward hook"),
        (lambda model: model.register_full_backward_pre_hook(lambda m, o: None), r"the model \(_Flexible\) has a backward hook"),
    ],
)
def test_hooks_of_backward_are_refused(add: Callable[[_Flexible], Any], said: str) -> None:
    plain = _Flexible()
    handle = add(plain)
    model = chunkft_compile.compile(plain, budget="1MB")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        model.plan(**_dict_batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    handle.remove()
    model.plan(**_dict_batch())
