"""A model and one batch in, the joint forward and backward graph out.

Every private torch name that capture needs is in this file; checked on torch 2.13.0.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

# Private (2.13.0): what `torch.compile(model)` gives.
from torch._dynamo.eval_frame import OptimizedModule

# Private (2.13.0): Dynamo's export front end. Plain `make_fx` cannot trace transformers' mask code, which reads tensor values.
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.functional_export import dynamo_graph_capture_for_export

# Private (2.13.0): the joint graph with descriptors keeps view aliasing, which `aot_export_module` loses.
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from chunkft_compile.errors import CaptureError
from chunkft_compile.names import named_once
from chunkft_compile.passes import run_passes
from chunkft_compile.sizes import Symbols, depends_on_data, fold_sizes, is_symbolic, symbolic_inputs, symbols_allowed
from chunkft_compile.traced import MODEL, Bound, TracedModel

logger = logging.getLogger(__name__)


class Dropped:
    """Stands where an output was left out of training, so that reading it is an error and not a silent `None`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}: not kept while training>"

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(
            f"output {self._name!r} is not kept while training, because it would live through the whole backward; "
            f'compile(..., outputs="all") keeps it'
        )


@dataclass(frozen=True, eq=False)
class Capture:
    """The joint graph of one input signature.

    `graph` holds ATen calls only; `constants` are tensors that tracing lifted out of the code. `outputs` are the model's
    outputs as flat leaves, each a node or a constant; `rebuild` gives them their structure back. Node dictionaries map
    placeholders to names (`params`, `buffers`) or positions (`inputs` among the tensor leaves, `tangents` among `outputs`). `copied`
    blocks of the model were not traced, but are copies of another.
    """

    graph: fx.Graph
    fake_mode: FakeTensorMode
    params: dict[fx.Node, str]
    buffers: dict[fx.Node, str]
    inputs: dict[fx.Node, int]
    tangents: dict[fx.Node, int]
    constants: dict[fx.Node, torch.Tensor]
    outputs: tuple[Any, ...]
    gradients: dict[str, fx.Node]
    mutations: dict[str, fx.Node]
    out_spec: pytree.TreeSpec
    lost: tuple[str, ...]
    copied: int = 0

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """The model's own output object around `leaves`, with `Dropped` in the fields that training does not keep."""
        output = pytree.tree_unflatten(list(leaves), self.out_spec)
        if not self.lost:
            return output
        for name in self.lost:
            if type(output) is dict:
                output[name] = Dropped(name)
            else:  # past `__setattr__`: a ModelOutput would turn the attribute into a key, and code iterates over its keys
                object.__setattr__(output, name, Dropped(name))
        return output


class Template(nn.Module):
    """Takes the tensors of a call and calls the model with them and the call's constants in their places."""

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, *, loss_only: bool) -> None:
        super().__init__()
        self.model = model
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.spec = spec
        self.loss_only = loss_only

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = self.model(*args, **kwargs)
        if self.loss_only and hasattr(output, "keys") and "loss" in output.keys():  # noqa: SIM118 (Dynamo traces keys())
            return type(output)(loss=output["loss"]), tuple(key for key in output.keys() if key != "loss")  # noqa: SIM118
        return output, ()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind `torch.compile(model)`: its weights have their own names there. Capture sees through all other forms by itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss_only: bool = True, run_on_error: bool = True
) -> Capture:
    """Trace forward and backward of `model(*args, **kwargs)` into one graph.

    With `loss_only`, a model output that has a `loss` gives only that. Raises `CaptureError` with the user's file, line and
    operation where the model cannot be one graph; with `run_on_error` the model runs before that, to show a mistake in the call as
    what it is.
    """
    found, _ = _capture(model, args, kwargs, None, None, loss_only=loss_only, run_on_error=run_on_error)
    return found


def capture_symbolic(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    named: Sequence[Sequence[object]],
    like: fx.Graph,
    *,
    loss_only: bool = True,
) -> tuple[Capture, Symbols]:
    """As `capture`, with symbols for some dimensions of the batch, and where each symbol stands there.

    `named` has for every dimension of every tensor its name, or None for a dimension that stays a number. Dimensions of one name are
    taken to be equal. `like` is the graph of some batch, which this one will resemble where it can. What tracing cannot decide for all
    sizes, it decides for those that `args` and `kwargs` have, and the shape environment of `fake_mode` keeps that as guards. Sizes are no
    nodes of the graph but arguments of its calls.
    """
    if isinstance(model, TracedModel):
        raise CaptureError("the model was traced already, for the sizes of one batch")
    return _capture(model, args, kwargs, named, like, loss_only=loss_only)


def _capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    named: Sequence[Sequence[object]] | None,
    like: fx.Graph | None,
    *,
    loss_only: bool,
    run_on_error: bool = True,
) -> tuple[Capture, Symbols]:
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    template = Template(model, leaves, spec, loss_only=loss_only)
    template.training = model.training
    # `detach` makes distinct objects: Dynamo would take labels that are the very tensor input_ids for one input.
    tensors = tuple(leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor))
    for tensor, names in zip(tensors, named or (), strict=named is not None):
        torch._dynamo.maybe_mark_dynamic(tensor, [dim for dim, name in enumerate(names) if name is not None])
    # Not dynamic: at the second shape Dynamo would trace symbols, which the static fakes below then throw away.
    # RNN modules are traced through: the patched flag only says that recompiling for other lengths is slow.
    config = torch._dynamo.config.patch(ignore_logging_functions=_log_methods(), automatic_dynamic_shapes=False, allow_rnn=True)
    with torch.enable_grad(), _side_effects_told(model), config, _backward_without_autocast(model):
        try:
            traced, fake_mode = _trace(model, leaves, template, tensors)
            symbols, fakes = Symbols(), tuple[torch.Tensor, ...]()
            with contextlib.ExitStack() as stack:
                stack.enter_context(tracing(TracingContext(fake_mode)))
                if named is None:
                    # Static fakes: AOTAutograd would give inputs symbolic sizes, and bytes need numbers. So one graph per shape.
                    fakes = tuple(fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors)
                else:
                    fakes, symbols = symbolic_inputs(traced, tensors, named)
                joint = aot_export_joint_with_descriptors(stack, traced, fakes, {}, _record_nn_module_stack=True)
        except (TorchDynamoException, RuntimeError, NotImplementedError) as error:
            if run_on_error:
                with torch.no_grad():
                    model(*args, **kwargs)  # a mistake in the call or the model itself is shown as what it is
            raise _explain(error, model) from error
    if like is not None:
        fold_sizes(joint.graph_module.graph, like)
    with symbols_allowed():
        found = _read(joint, fake_mode, _first_names(model), symbolic=like is not None)
    # Dynamo (2.13.0) keeps the traced module for good, and with it the batch and the model.
    vars(traced).clear()
    return found, symbols


def _trace(
    model: nn.Module, leaves: Sequence[Any], template: Template, tensors: Sequence[torch.Tensor]
) -> tuple[fx.GraphModule, FakeTensorMode]:
    """The graph of a call, by Dynamo if it has not traced it already."""
    if isinstance(model, TracedModel):
        (bound,) = (leaf for leaf in leaves if isinstance(leaf, Bound))
        return model.graph_module(bound), FakeTensorMode(shape_env=ShapeEnv())
    traced: fx.GraphModule = dynamo_graph_capture_for_export(template)(*tensors)
    return traced, traced.meta["fake_mode"]


def _backward_without_autocast(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The backward is that of a loop that calls it outside of its autocast, as loops should. Not every device knows autocast."""
    if not any(torch.is_autocast_enabled(kind) for kind in {parameter.device.type for parameter in model.parameters()}):
        return contextlib.nullcontext()
    return torch._functorch.config.patch(backward_pass_autocast="off")  # type: ignore[no-any-return]  # private (2.13.0)


@contextlib.contextmanager
def _side_effects_told(model: nn.Module) -> Iterator[None]:
    """Dynamo warns of Python state that forward changes. It will not change in the graph, so it is said once, in our words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        found = re.search(r"side effects happened.*?\[(.*)\]", str(warning.message), re.DOTALL)
        if found is None:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        # transformers collects outputs in a global of its own, and notes in the config what kind of problem the labels are
        elif sources := [source.strip() for source in found[1].split(",") if not re.search(r"__import_transformers|\.config\"", source)]:
            what = ", ".join(sources)
            warnings.warn(f"{type(model).__name__}.forward changes Python state ({what}); training steps will not change it", stacklevel=5)


def _log_methods() -> set[Any]:
    """Logging says nothing to the graph. Libraries add methods of their own to Logger (transformers: `warning_once`)."""
    return {method for name, method in vars(logging.Logger).items() if callable(method) and not name.startswith("_")}


def _explain(error: Exception, model: nn.Module) -> CaptureError:
    """The user's line, the operation, and the way out."""
    frames = list(getattr(error, "real_stack", None) or [])
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {(frames[-1].line or '').strip()}" if frames else type(model).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = lines[0] if lines else type(error).__name__
    hint = next((line.removeprefix("Hint:").strip() for line in lines if line.startswith("Hint:")), "")
    advice = hint or "move this code out of forward(), or make it a tensor operation"
    return CaptureError(f"cannot capture {type(model).__name__} as one graph at {where}\n  {what}\n  way out: {advice}")


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor: Dynamo takes the name that forward used."""
    return {name: names[0] for _, names in named_once(model) for name in names}


def _read(joint: Any, fake_mode: FakeTensorMode, first_names: Mapping[str, str], *, symbolic: bool) -> Capture:
    """Turn descriptors into plain dictionaries; positions are never relied upon."""

    def first(target: str) -> str:
        return first_names[target.removeprefix(MODEL)]

    module = joint.graph_module
    graph: fx.Graph = module.graph
    _refuse_unplannable(graph, symbolic=symbolic)
    run_passes(graph, fake_mode)
    params, buffers, inputs, tangents = {}, {}, {}, {}
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta["desc"]
        match type(desc).__name__:
            case "ParamAOTInput":
                params[node] = first(desc.target)
            case "BufferAOTInput":
                buffers[node] = first(desc.target)
            case "PlainAOTInput":
                inputs[node] = desc.idx
            case "TangentAOTInput":
                tangents[node] = _output_index(desc.output, node)
            case other:
                raise CaptureError(f"the graph has an input of type {other} ({node.name}), which chunked training does not support")
    output = graph.output_node()
    results: Any = output.args[0]
    outputs: dict[int, Any] = {}
    gradients: dict[str, fx.Node] = {}
    mutations: dict[str, fx.Node] = {}
    for desc, value in zip(output.meta["desc"], results, strict=True):
        if desc is None:  # the place of a gradient that an integer input does not have
            continue
        match type(desc).__name__:
            case "PlainAOTOutput":
                outputs[desc.idx] = value
            case "GradAOTOutput":
                if value is not None and hasattr(desc.grad_of, "target"):
                    gradients[first(desc.grad_of.target)] = value
            case "InputMutationAOTOutput" if type(desc.mutated_input).__name__ == "BufferAOTInput":
                mutations[first(desc.mutated_input.target)] = value
            case other:
                raise CaptureError(f"the model gives an output of type {other} ({value}), which chunked training does not support")
    leaves = [outputs[i] for i in range(len(outputs))]
    whole, lost = joint.out_spec.child(0), joint.out_spec.child(1).num_leaves
    names = tuple(str(leaf) for leaf in leaves[len(leaves) - lost :]) if lost else ()
    constants = {node: getattr(module, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    kept = tuple(leaves[: len(leaves) - lost])
    if any(is_symbolic(leaf) for leaf in kept):
        raise CaptureError("the model gives a size of the batch as an output, which is one number for each size")
    return Capture(graph, fake_mode, params, buffers, inputs, tangents, constants, kept, gradients, mutations, whole, names)


def _output_index(desc: Any, node: fx.Node) -> int:
    if type(desc).__name__ != "PlainAOTOutput":
        raise CaptureError(f"the backward starts from {desc} ({node.name}), which is not an output of the model")
    return int(desc.idx)


def _refuse_unplannable(graph: fx.Graph, *, symbolic: bool) -> None:
    """Sizes must be known, or follow from the batch's, and every node be an ATen call on tensors, else the plan would be a guess."""
    for node in sorted(graph.nodes, key=lambda node: node.op == "placeholder"):  # calls first: they know their line
        value = node.meta.get("val")
        leaves = pytree.tree_leaves(value) if node.op != "output" else []
        lines = (node.meta.get("stack_trace") or "").strip().splitlines()
        files = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ")]
        place = "\n  ".join(line.strip() for line in lines[files[-1] : files[-1] + 2]) if files else node.name
        if any(depends_on_data(leaf) if symbolic else is_symbolic(leaf) for leaf in leaves):
            raise CaptureError(
                f"the size of {node.name} ({node.target}) depends on the data of the batch\n  {place}\n"
                f"  way out: use fixed sizes, e.g. torch.where instead of boolean indexing"
            )
        if node.op == "get_attr" and not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"{node.name} ({node.target}) calls a sub-graph\n  {place}\n"
                f"  way out: remove the higher-order operator (flex_attention, torch.cond)"
            )
