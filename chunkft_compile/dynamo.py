"""The backend "chunkft" of `torch.compile`: full-graph training of the model under a byte budget.

Dynamo gives a graph that has the parameters as inputs. Behind it is one `ChunkedModule` for as long as the parameters are the same:
graphs of other shapes or modes are other signatures of it. Optimizers are the user's, over the original parameters, and are adopted:
their groups hold the chunks from then on. A parameter's own `.grad` only stands for those of its chunks, see `ChunkedGradient`.

Everything that Dynamo tells a backend beside the graph is read here; checked on torch 2.13.0.
"""

import gc
import inspect
import itertools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from chunkft_compile.errors import CaptureError, TrainingError
from chunkft_compile.module import ChunkedModule, compile
from chunkft_compile.runtime.adopting import ChunkedGradient
from chunkft_compile.runtime.optimizers import optimizers_of
from chunkft_compile.traced import Place, Trace, TracedModel

Call = Callable[..., Sequence[Any]]

_NOT_OPTIONS = {
    "model": "it is what torch.compile is called with",
    "device": "move the model before torch.compile",
    "outputs": "all outputs of the graph are kept",
    "schedule": "use chunkft_compile.compile",
    "weights": "they stay on an accelerator; use chunkft_compile.compile",
}
_OPTIONS = tuple(name for name in inspect.signature(compile).parameters if name not in _NOT_OPTIONS)
_STORES = re.compile(r"\._(?:modules|parameters|buffers)\[")
_KEYS = re.compile(r"\[(?:'([^']*)'|(\d+))\]")

_TRAINING = "chunkft_training"  # attribute of the leaf of a chunk
_numbers = itertools.count()
_trainings: "weakref.WeakSet[_Training]" = weakref.WeakSet()


def chunkft(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Call:
    """Compile one graph: `torch.compile(model, backend="chunkft", options={"budget": "14GB"})`.

    `options` are those of `chunkft_compile.compile` but for `device`, `outputs`, `schedule` and `weights`. Raises `ValueError` for others,
    `CaptureError` for a graph break or a graph that trains nothing, `TrainingError` for a graph that trains other parameters than the
    first one of the model. Dynamo shows them as the cause of its own `BackendCompilerFailed`. Without gradients the graph runs as it is.
    """
    chosen = _checked(options or {})
    if not torch.is_grad_enabled():
        return gm.forward
    _refuse_break(gm)
    places, weights, root = _read(gm, example_inputs)
    training = _training_of(weights, chosen)
    trace = Trace(next(_numbers), gm, tuple(training.renamed(place, weights) for place in places), root)
    return lambda *arguments: training.call(trace, arguments)


def chunked_of(model: nn.Module) -> ChunkedModule:
    """What trains `model`, which is under `torch.compile(backend="chunkft")`: its plan, its progress, its chunks.

    Raises `ValueError` before the first training call.
    """
    ids = {id(parameter) for parameter in model.parameters()}
    found = [training.chunked for training in _trainings if training.trained & ids]
    if not found:
        raise ValueError(f"{type(model).__name__} has not been compiled by the backend chunkft: make a training call first")
    return found[0]


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _NOT_OPTIONS:
            raise ValueError(f"the backend chunkft has no option {name!r}: {_NOT_OPTIONS[name]}")
        if name not in _OPTIONS:
            raise ValueError(f"the backend chunkft has no option {name!r}, only {', '.join(_OPTIONS)}")
    if options.get("budget") is None:
        raise ValueError('the backend chunkft needs a budget: torch.compile(model, backend="chunkft", options={"budget": "14GB"})')
    return dict(options)


def _refuse_break(gm: fx.GraphModule) -> None:
    # Private (2.13.0): why Dynamo ended the graph here
    reason: Any = gm.compile_subgraph_reason
    if reason.graph_break:
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = f" at {frame.filename}:{frame.lineno}: {frame.line}" if frame else ""
        raise CaptureError(
            f"the graph breaks{where}\n  {str(reason.reason).strip().splitlines()[0]}\n"
            f"  way out: the backend chunkft trains a model that is one graph; compile the model, or a function from the batch to the loss "
            f"(not backward and optimizer.step()), and move this code out of it. fullgraph=True shows every break"
        )


def _read(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[list[Place], dict[str, torch.Tensor], str]:
    """What the inputs of the graph are, the parameters and buffers by name, and how the module that they belong to is called there."""
    nodes = gm.graph.find_nodes(op="placeholder")
    # Private (2.13.0): where in the user's frame an input comes from
    sources = {node: str(node._dynamo_source.name) for node in nodes}
    kept = {node for node, tensor in zip(nodes, example_inputs, strict=True) if _is_kept(sources[node], tensor)}
    roots = {_STORES.split(sources[node], maxsplit=1)[0] for node in kept}
    places, weights = [], dict[str, torch.Tensor]()
    for node, tensor in zip(nodes, example_inputs, strict=True):
        if node in kept:
            name = _name(sources[node], alone=len(roots) == 1)
            assert name not in weights, f"two weights are called {name}"
            weights[name] = tensor
            places.append(Place("weight", name))
        elif isinstance(tensor, torch.Tensor):
            if tensor.requires_grad:
                raise CaptureError(
                    f"the input {sources[node]} of shape {tuple(tensor.shape)} needs a gradient and is no parameter: it comes from "
                    f"a part of the model that is not in this graph\n"
                    f"  way out: compile the whole model; fullgraph=True shows what splits it"
                )
            places.append(Place("batch"))
        else:
            places.append(Place("size"))
    if not any(tensor.requires_grad for tensor in weights.values()):
        raise CaptureError(
            "no input of this graph is a trainable parameter, so that it trains nothing\n"
            "  way out: compile the model, or a function that calls it; run what needs no gradients under torch.no_grad()"
        )
    return places, weights, roots.pop() if len(roots) == 1 else ""


def _is_kept(source: str, tensor: object) -> bool:
    return isinstance(tensor, nn.Parameter) or (isinstance(tensor, torch.Tensor) and "._buffers[" in source)


def _name(source: str, *, alone: bool) -> str:
    """`L['self']._modules['a']._parameters['weight']` -> `a.weight`. Where there are several roots, theirs come first."""
    split = _STORES.search(source)
    start = split.start() if split and alone else 0
    return ".".join(key or number for key, number in _KEYS.findall(source[start:]))


class _Training:
    """The chunked model behind all graphs that train the same parameters."""

    def __init__(self, weights: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> None:
        self.options = options
        self.names = {id(tensor): name for name, tensor in weights.items()}
        self.trained = {id(tensor) for tensor in weights.values() if tensor.requires_grad}
        model = TracedModel(weights)
        on_cpu = all(tensor.device.type == "cpu" for tensor in weights.values())
        # Dynamo guards the devices of its inputs: on an accelerator, weights that are away would be others to it
        self.chunked: ChunkedModule = compile(model, **options, outputs="all", weights=None if on_cpu else ("device",))
        self.chunked.adopt_optimizers()
        self._nothing = {
            chunk.weight.dtype: torch.full((), torch.nan, dtype=chunk.weight.dtype, device=chunk.weight.device)
            for chunk in self.chunked.chunks
        }
        for chunk in self.chunked.chunks:  # as long as an optimizer trains the chunks, graphs that Dynamo makes anew find this one
            setattr(chunk.leaf, _TRAINING, self)
        _trainings.add(self)

    def renamed(self, place: Place, weights: Mapping[str, torch.Tensor]) -> Place:
        """The same place under the name that the first graph had for its weight."""
        return Place("weight", self.names[id(weights[place.name])]) if place.kind == "weight" else place

    def call(self, trace: Trace, arguments: Sequence[Any]) -> Sequence[Any]:
        """The outputs of the graph, connected to the active chunks."""
        if not torch.is_grad_enabled():
            return trace.module(*arguments)  # type: ignore[no-any-return]
        self._stand_in()
        bound, batch = trace.bind(arguments)
        return self.chunked(bound, *batch)  # type: ignore[no-any-return]

    def _stand_in(self) -> None:
        """`.grad` of a parameter stands for those of its chunks: what `model.zero_grad()` has cleared there is cleared here."""
        for chunk in self.chunked.chunks:
            if chunk.weight.grad is None:
                chunk.leaf.grad = None
        for chunk in self.chunked.chunks:
            if chunk.weight.grad is None:
                chunk.weight.grad = ChunkedGradient.standing_for(chunk.weight, self._nothing[chunk.weight.dtype])


def _training_of(weights: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> _Training:
    """The one that trains these parameters already, or a new one."""
    trained = {id(tensor) for tensor in weights.values() if tensor.requires_grad}
    gc.collect()  # one that Dynamo has dropped together with its model is no hindrance
    for training in _trainings:
        if not training.trained & trained:
            continue
        if training.options != options:
            raise ValueError(f"these parameters are trained with the options {training.options} already, and not with {dict(options)}")
        strange = [name for name, tensor in weights.items() if id(tensor) not in training.names]
        missing = [training.names[number] for number in training.trained - trained]
        if strange or missing:
            raise TrainingError(
                f"a graph of this model {'also needs' if strange else 'lacks'} {_few(strange or missing)}, unlike the first one: the model "
                f"is split into several graphs, or needs other parameters in another mode\n  way out: compile it as one graph "
                f"(fullgraph=True shows what splits it)"
            )
        return training
    return _Training(_in_order(weights), options)


def _in_order(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the user's optimizers list them, which is how the model does; a graph has them as its forward comes across them."""
    found = optimizers_of(tensor for tensor in weights.values() if isinstance(tensor, nn.Parameter))
    listed = [id(parameter) for optimizer in found for group in optimizer.param_groups for parameter in group["params"]]
    place = {number: i for i, number in reversed(list(enumerate(listed)))}
    return dict(sorted(weights.items(), key=lambda item: place.get(id(item[1]), len(listed))))


def _few(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
