"""Ways to train every parameter of the benchmark model, each as it would be written in practice with stock torch.

All of them use AdamW(fused=True), but for the one Adafactor. Gradients are set to None as soon as they were used. Checkpointing is that of
transformers. A *sweep* is the steps after which every parameter was trained once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Adafactor, AdamW, Optimizer

import chunkft_compile
from benchmarks.common import Batch, compile_model, train_step
from benchmarks.llama import build_model
from chunkft_compile.assembly import Assembled
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.stores import Stores

LEARNING_RATE = 1e-5


class Trainer(Protocol):
    """A model with its optimizers and its loop."""

    @property
    def steps(self) -> int:
        """Steps of a sweep; known after the first step."""
        ...

    def step(self, batch: Batch) -> None:
        """Forward, backward and update of whatever this step trains."""
        ...


class Plain:
    """Every trainable parameter at every step by one optimizer."""

    steps = 1

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)

    def step(self, batch: Batch) -> None:
        """See `Trainer.step`."""
        train_step(self._model, self._optimizer, batch)


class InBackward:
    """Every parameter at every step: each has an optimizer of its own, which runs as soon as its gradient is complete and frees it."""

    steps = 1

    def __init__(self, model: nn.Module, optimizer_of: Callable[[nn.Parameter], Optimizer]) -> None:
        self._model = model
        self._optimizers = {parameter: optimizer_of(parameter) for parameter in model.parameters()}
        for parameter in self._optimizers:
            parameter.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]

    def step(self, batch: Batch) -> None:
        """See `Trainer.step`."""
        torch.autograd.backward(self._model(**batch).loss)

    def _update(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter), "hooks are on parameters"
        self._optimizers[parameter].step()
        self._optimizers[parameter].zero_grad()


class Rotation:
    """One group of parameters a step; the others need no gradient, so autograd stops at the group and saves nothing below it.

    The state of the active group exists only around its update: it comes from a file and goes back there (`keep`), moved by the same
    code as ours, or it is dropped.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], *, keep: bool) -> None:
        trained = [parameter for group in groups for parameter in group]
        assert len({id(p) for p in trained}) == len(trained) == len(list(model.parameters())), "groups share or miss a parameter"
        self._model, self._groups, self._keep = model, groups, keep
        self._optimizers: dict[int, Optimizer] = {}
        device = trained[0].device
        self._stores = Stores(device, None)
        self._mover = StateMover(self._stores, device, lambda chunk: self._stores.placements[0])
        self._next = 0

    @property
    def steps(self) -> int:
        """See `Trainer.steps`."""
        return len(self._groups)

    def step(self, batch: Batch) -> None:
        """See `Trainer.step`."""
        number, self._next = self._next, (self._next + 1) % len(self._groups)
        group = self._groups[number]
        self._model.requires_grad_(False)
        for parameter in group:
            parameter.requires_grad_()
        torch.autograd.backward(self._model(**batch).loss)
        optimizer = self._optimizers.get(number) or AdamW(group, lr=LEARNING_RATE, fused=True)
        chunks = [Chunk("", 0, len(parameter), len(parameter), parameter, parameter) for parameter in group]
        for chunk in chunks:
            self._mover.fetch(optimizer, chunk, rows=False)
        for chunk in chunks:
            self._mover.wait(chunk)
        optimizer.step()
        optimizer.zero_grad()
        if self._keep:
            self._optimizers[number] = optimizer
            for chunk in chunks:
                self._mover.send_away(optimizer, chunk)


class Ours:
    """The compiled model in the ordinary loop; optimizer state in a file, and weights where the plan wants them or all on the device."""

    def __init__(
        self,
        layers: int,
        budget_nbytes: int,
        update: str,
        *,
        fused: bool,
        dtype: str = "fp32",
        backend: str = "eager",
        resident: bool = False,
    ) -> None:
        plain = build_model(layers, dtype)
        self.model: chunkft_compile.ChunkedModule = compile_model(plain, budget_nbytes, update, backend, resident=resident)
        self._optimizer = AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=fused)

    @property
    def steps(self) -> int:
        """See `Trainer.steps`."""
        return self.model.progress.steps

    def programs(self) -> list[Assembled]:
        """The program of every step of a sweep; known after the first step."""
        session = self.model._session
        compiled = session.latest
        assert compiled is not None, "programs are known after the first step"
        return [session.program(compiled, step) for step in session.planned.schedule.steps]

    def step(self, batch: Batch) -> None:
        """See `Trainer.step`. Raises `BudgetError` at the first step if no plan fits."""
        train_step(self.model, self._optimizer, batch)


def _adamw_of(parameter: nn.Parameter) -> Optimizer:
    return AdamW([parameter], lr=LEARNING_RATE, fused=True)


def _adafactor_of(parameter: nn.Parameter) -> Optimizer:
    return Adafactor([parameter], lr=LEARNING_RATE)


def layers_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The groups of a Llama, lowest first: embedding; each block; the last norm with the head."""
    inner = model.get_submodule("model")
    blocks = [list(block.parameters()) for block in inner.get_submodule("layers").children()]
    head = [*inner.get_submodule("norm").parameters(), *model.get_submodule("lm_head").parameters()]
    return [list(inner.get_submodule("embed_tokens").parameters()), *blocks, head]


def _rotation(model: nn.Module, *, keep: bool) -> Rotation:
    return Rotation(model, layers_of(model), keep=keep)


def _compiled(model: nn.Module) -> nn.Module:
    """By Inductor, as one graph of fixed shapes."""
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
    return compiled  # type: ignore[no-any-return]


def _with_adapters(model: nn.Module) -> nn.Module:
    """Rank 8 beside every matrix of every block (peft); the model itself is frozen."""
    from peft import LoraConfig, get_peft_model

    adapted: nn.Module = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return adapted.train()


HIFT = ("HiFT m = 1, state in a file", "HiFT m = 1, state in a file + checkpointing")
BADAM = ("BAdam, state dropped", "BAdam, state dropped + checkpointing")
PLAIN = "plain AdamW"
CHECKPOINTING = "AdamW + checkpointing"
COMPILED = "AdamW + torch.compile"
LORA = "LoRA, r = 8 (not full)"

RIVALS: dict[str, Callable[[int, str], Trainer]] = {
    PLAIN: lambda *size: Plain(build_model(*size)),
    CHECKPOINTING: lambda *size: Plain(build_model(*size, checkpointing=True)),
    COMPILED: lambda *size: Plain(_compiled(build_model(*size))),
    LORA: lambda *size: Plain(_with_adapters(build_model(*size))),
    "in-backward AdamW + checkpointing": lambda *size: InBackward(build_model(*size, checkpointing=True), _adamw_of),
    "in-backward Adafactor + checkpointing": lambda *size: InBackward(build_model(*size, checkpointing=True), _adafactor_of),
    HIFT[0]: lambda *size: _rotation(build_model(*size), keep=True),
    HIFT[1]: lambda *size: _rotation(build_model(*size, checkpointing=True), keep=True),
    BADAM[0]: lambda *size: _rotation(build_model(*size), keep=False),
    BADAM[1]: lambda *size: _rotation(build_model(*size, checkpointing=True), keep=False),
}
