"""Planning without the model's weights and without the machine: a config in, the same tables as for a real model out.

The model is built of fake tensors, which have shapes and no memory, and goes through the same capture, lowering and probing. What
differs is where figures come from: operators from `roofline.RooflineCosts`, the optimizer from `model_optimizer`, links and
allocator blocks from the device's spec. All of it is modelled, nothing measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.capture import Capture, capture
from chunkft_compile.compiled import Compiled, Setting, fixed_nbytes, layouts_of, model_nbytes
from chunkft_compile.costs import Costs
from chunkft_compile.deepening import deepen, is_a_stack, shallow_config
from chunkft_compile.planner import Fingerprint, Link, Placement, Plan, Problem, Schedule, Update, restrict, smallest_budget
from chunkft_compile.planner.devices import Device
from chunkft_compile.planner.grounds import room_on
from chunkft_compile.presets import PRESETS
from chunkft_compile.roofline import RooflineCosts
from chunkft_compile.runtime.chunks import chunk_limit_nbytes, split_parameters, storage_nbytes, with_blocks
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.runtime.precision_costs import model_update
from chunkft_compile.segments import cut
from chunkft_compile.solving import describe_inputs, dtypes_of, graph_hash
from chunkft_compile.widening import widen_gradients


@dataclass(frozen=True)
class Shape:
    """Tokens of a batch: `batch` sequences of `seq`."""

    batch: int
    seq: int


@dataclass(frozen=True)
class Choices:
    """What the planner may choose from, and the capacity of the host (None: no limit).

    None for `state` is every place, for `options` every option; see `planner.restrict` for their names.
    `overlap` counts on copies beside compute, where the device can. The runtime makes them so; nobody has measured it on a GPU.
    """

    updates: tuple[Update, ...] = (Update.HELD,)
    state: tuple[Placement, ...] | None = None
    weights: tuple[Placement, ...] = (Placement.DEVICE,)
    host_nbytes: int | None = None
    overlap: bool = False
    options: tuple[str, ...] | None = None


def read_config(source: str) -> Any:
    """The transformers config of a preset name, a `config.json` or a directory that has one. Raises `ValueError`."""
    preset = PRESETS.get(source.lower())
    if preset is not None:
        return _make_config({**preset.settings, "model_type": preset.model_type}, source)
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        missing = f"{path} has no config.json" if path.is_dir() else f"{source!r} is neither a preset nor a file"
        raise ValueError(f"{missing}; presets: {', '.join(PRESETS)}; or pass a config.json or a directory with one (nothing is downloaded)")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(f"{file} is not the config of a model: it has no `model_type`; pass the one from a Hugging Face directory")
    return _make_config(settings, str(file))


def _make_config(settings: Mapping[str, Any], source: str) -> Any:
    transformers = _transformers()
    rest = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(settings["model_type"], **rest)
    except Exception as error:  # configs validate themselves in many ways; the file is what the user can change
        raise ValueError(f"the config of {source} is not valid: {' '.join(str(error).split())}") from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{source} is a {config.model_type!r}, which is not a causal language model")
    config.use_cache = False  # an output that training does not keep
    return config


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ModuleNotFoundError as error:
        raise ValueError("reading a model's config needs the package transformers: pip install 'chunkft_compile[hf]'") from error


def build_fake(config: Any, dtype: torch.dtype, *, block_nbytes: int = 1) -> tuple[nn.Module, FakeTensorMode]:
    """The model of a config in training mode, its weights fake tensors on the CPU that count in blocks of `block_nbytes`."""
    mode = with_blocks(FakeTensorMode(), block_nbytes)
    with mode:
        model: nn.Module = _transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train(), mode


class OfflineModel:
    """One config captured for one shape; problems for any budget, optimizer and choices come from it.

    A stack of equal blocks is captured with three of them (`deepening.py`); `whole` captures all. `precision` is what the optimizer
    computes in; raises `ValueError` for one that means nothing to weights of `dtype`.
    """

    def __init__(
        self,
        config: Any,
        shape: Shape,
        dtype: torch.dtype,
        device: Device,
        *,
        costs: Costs | None = None,
        whole: bool = False,
        precision: Precision = Precision.PLAIN,
    ) -> None:
        _check_length(config, shape)
        precision.check([dtype])
        self.device = device
        self.precision = precision
        self.costs = costs if costs is not None else RooflineCosts(device)
        self.layers = int(getattr(config, "num_hidden_layers", 0))
        self.model, _ = build_fake(config, dtype, block_nbytes=device.block_nbytes)
        shallow = None if whole else shallow_config(config)
        self._cache: dict[object, Problem] = {}
        self._trace(config if shallow is None else shallow, shape, dtype)
        if shallow is not None and not is_a_stack([segment.kind for segment in cut(self._capture)]):
            self._trace(config, shape, dtype)

    @property
    def weights_nbytes(self) -> int:
        """Weights and buffers."""
        return storage_nbytes([*self.model.parameters(), *self.model.buffers()])

    def problem(self, budget_nbytes: int, optimizer: str, choices: Choices, *, accumulating: bool = False) -> Problem:
        """The planner's question. Raises `ValueError` where the choices contradict each other or the device."""
        _check_choices(choices, self.device)
        key = (chunk_limit_nbytes(self.model, budget_nbytes), optimizer, accumulating)
        if key not in self._cache:
            problem = self._problem(key[0], optimizer, accumulating=accumulating)
            self._cache[key] = self._deepened(problem, key[0], optimizer) if self._traced_layers < self.layers else problem
        problem = replace(
            self._cache[key],
            budget_nbytes=budget_nbytes,
            links=tuple(_link(link, choices) for link in self.device.links),
            updates=choices.updates,
            weights=choices.weights,
        )
        problem = restrict(problem, options=choices.options, state=choices.state)
        _check_host(problem, choices)
        return problem

    def kept(self, problem: Problem, schedule: Schedule, optimizer: str) -> Plan:
        """A schedule to keep, for the device that was modelled. Its peaks and times are the planner's bounds."""
        traced = [(segment.name, segment.kind) for segment in cut(self._capture)]
        # blocks between the first and the last one of the whole model are like the first
        kinds = [traced[0][1], *(traced[1][1] for _ in problem.segments[1:-1]), traced[-1][1]]
        same = len(problem.segments) == len(traced)
        segments = traced if same else [(segment.name, kind) for segment, kind in zip(problem.segments, kinds, strict=True)]
        made_for = Fingerprint(
            graph=graph_hash(segments),
            chunks=tuple(chunk.name for chunk in problem.chunks),
            inputs=describe_inputs((), {"input_ids": self._ids, "labels": self._ids}),
            dtype=dtypes_of(self.model.parameters()),
            device=self.device.name,
            optimizer=optimizer,
            accumulating=problem.accumulating,
            torch=str(torch.__version__),
            precision=str(self.precision),
        )
        return Plan(made_for, problem, schedule)

    def _trace(self, config: Any, shape: Shape, dtype: torch.dtype) -> None:
        """Capture the model of `config`, which is the one to plan for or a shallow one."""
        self._traced_layers = int(getattr(config, "num_hidden_layers", 0))
        self._traced, mode = build_fake(config, dtype, block_nbytes=self.device.block_nbytes)
        with mode:
            self._ids = torch.zeros(shape.batch, shape.seq, dtype=torch.int64)
        self._capture: Capture = widen_gradients(capture(self._traced, (), {"input_ids": self._ids, "labels": self._ids}), self.precision)
        with_blocks(self._capture.fake_mode, self.device.block_nbytes)

    def _problem(self, limit_nbytes: int, optimizer: str, *, accumulating: bool) -> Problem:
        """The question for the captured model, by the code that real models take."""
        setting = self._setting(self._traced, limit_nbytes, optimizer)
        # a training step also has a scalar that ties it to autograd
        fixed = fixed_nbytes(model_nbytes(self._traced), self._capture, [self._ids]) + self.device.allocated_nbytes(4)
        fixed += self._stand_ins_nbytes(setting)
        return Compiled(self._capture, fixed, self.costs, setting).problem(accumulating=accumulating)

    def _setting(self, model: nn.Module, limit_nbytes: int, optimizer: str) -> Setting:
        chunks = split_parameters(model, limit_nbytes, wide=self.precision is not Precision.PLAIN)
        cost = model_update(optimizer, layouts_of(chunks), self.device, self.precision)
        return Setting(self.device.memory_nbytes, chunks, cost, self.device.links, precision=self.precision)

    def _stand_ins_nbytes(self, setting: Setting) -> int:
        return self.device.allocated_nbytes(4) * sum(chunk.stand_in is not None for chunk in setting.chunks)

    def _deepened(self, problem: Problem, limit_nbytes: int, optimizer: str) -> Problem:
        """The question for the whole model: what the shallow one holds throughout a step, less its weights, plus all weights."""
        deep, shallow = (self._setting(model, limit_nbytes, optimizer) for model in (self.model, self._traced))
        weights = [storage_nbytes([*model.parameters(), *model.buffers()]) for model in (self.model, self._traced)]
        more = weights[0] - weights[1] + deep.counter_nbytes - shallow.counter_nbytes
        more += self._stand_ins_nbytes(deep) - self._stand_ins_nbytes(shallow)
        return deepen(problem, [chunk.name for chunk in deep.chunks], self.layers, problem.static_nbytes + more)


def smallest_offline(model: OfflineModel, optimizer: str, choices: Choices, *, accumulating: bool = False) -> tuple[int, str]:
    """The smallest budget that has a schedule, and the instruction that binds it.

    Chunks are cut for a budget, so this starts from the finest and follows its own advice until a budget holds its own chunks.
    """
    nbytes = 1
    while True:
        found, binding = smallest_budget(model.problem(nbytes, optimizer, choices, accumulating=accumulating))
        if found <= nbytes:
            return nbytes, binding
        nbytes = found


def _check_length(config: Any, shape: Shape) -> None:
    most = getattr(config, "max_position_embeddings", shape.seq)
    if shape.seq > most:
        raise ValueError(f"{shape.seq} tokens are longer than the {most} positions of {config.model_type}")


def _link(link: Link, choices: Choices) -> Link:
    """What a link of the device is to the engine that is planned for."""
    capacity = choices.host_nbytes if link.placement is Placement.HOST else link.capacity_nbytes
    return replace(link, capacity_nbytes=capacity, overlaps=link.overlaps and choices.overlap)


def _check_choices(choices: Choices, device: Device) -> None:
    places = {Placement.DEVICE, *(link.placement for link in device.links)}
    for place in choices.weights:
        if place not in places:
            raise ValueError(f"{device.name} has no {place} beside it for weights: {', '.join(sorted(places))}")


def _check_host(problem: Problem, choices: Choices) -> None:
    """Whatever may go to the host and no further must have room there: nobody else takes it."""
    host = next((link for link in problem.links if link.placement is Placement.HOST), None)
    room = room_on(problem, host) if host is not None else None
    sizes = {
        "optimizer state": (problem.state, sum(chunk.state_nbytes for chunk in problem.chunks)),
        "weights": (problem.weights, sum(segment.weight_nbytes for segment in problem.segments)),
    }
    bound = {what: nbytes for what, (places, nbytes) in sizes.items() if Placement.HOST in places and Placement.DISK not in places}
    if room is not None and sum(bound.values()) > room:
        raise ValueError(
            f"{' and '.join(bound)} of {sum(bound.values())} bytes may go to the host and no further, which holds "
            f"{choices.host_nbytes} bytes and has {room} left beside what segments may offload: allow the disk too, or a larger host"
        )
