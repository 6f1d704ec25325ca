"""`ChunkedModule`: the user's model, trained chunk by chunk under a byte budget."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from chunkft_compile.appearance import showing_forward_of
from chunkft_compile.assembly import Assembled
from chunkft_compile.autocasting import Autocast
from chunkft_compile.budget import FORMS, parse_budget
from chunkft_compile.capture import unwrapped
from chunkft_compile.compiled import Compiled
from chunkft_compile.elsewhere import bringing, visiting
from chunkft_compile.errors import TrainingError
from chunkft_compile.planner import Placement, Plan, Prefer, Problem, Schedule, Update
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.engine import Run
from chunkft_compile.runtime.offload import Offloader
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.runtime.store import Traffic
from chunkft_compile.runtime.untraced import untraced
from chunkft_compile.session import Options, Session
from chunkft_compile.signatures import Counts
from chunkft_compile.solving import Solving, kept, read_plan, write_plan

_UPDATES = {"held": (Update.HELD,), "auto": (Update.HELD, Update.IMMEDIATE), "immediate": (Update.IMMEDIATE,)}


class Progress(NamedTuple):
    """Where training stands: step `step` of `steps` in sweep `sweep` (all from 0), its active chunks, its predicted peak."""

    step: int
    steps: int
    sweep: int
    active: tuple[str, ...]
    predicted_nbytes: int


def compile(
    model: nn.Module,
    budget: str | int | None = None,
    *,
    device: str | torch.device | None = None,
    schedule: str | Path | Plan | None = None,
    accumulation: bool = False,
    update: Literal["held", "auto", "immediate"] = "held",
    outputs: Literal["loss", "all"] = "loss",
    precision: Literal["plain", "master", "stochastic"] | None = None,
    store: str | Path | None = None,
    prefer: Prefer = "time",
    max_steps: int | None = None,
    options: Sequence[str] | None = None,
    state: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
    backend: Literal["eager", "inductor"] = "eager",
    solve_seconds: float = 5.0,
    seed: int = 0,
) -> "ChunkedModule":
    """`model`, ready to be fine-tuned in full within `budget` bytes on its device.

    `budget` is "14GB" (10^9 bytes), "13.5GiB" (2^30), "80%" of the device or an integer, and counts everything that tensors
    occupy while training: weights, buffers, batch, saved values, gradients, optimizer state, operator temporaries. What the
    training loop allocates outside the model is not in it.

    `device` is where it trains, if not where it is: a model on the CPU whose weights do not fit on the accelerator goes there as far as
    the plan says. `accumulation` plans for several backwards per optimizer step from the start; without it, the first second backward makes
    a new plan. `update` says when gradients are applied: "held" at `optimizer.step()`, so that they can be clipped and accumulated;
    "immediate" inside backward, each as soon as it is complete, which frees it at once (`optimizer.step()` is still called, after
    every backward); "auto" leaves it to the planner, step by step. `outputs="all"` keeps every output of the model through the
    backward, not only the loss. `precision` says what the optimizer computes in where weights are bf16 or fp16: "plain" (the default) in
    their own dtype, which loses updates below half a unit in the last place; "master" in fp32 weights that are kept with its state;
    "stochastic" in fp32 copies made for each update and rounded back at random (bf16 only). The leaves that `parameters()` yields are
    then fp32, and NaN between updates; the weights are where they always are, in the model. `store` is a directory for the
    optimizer state of inactive chunks (on a CPU; the default is the system's temporary directory). The planner looks for the fastest
    sweep, or with `prefer="fresh"` for the one with the fewest steps, and for no more than `max_steps` if given; `solve_seconds` and
    `seed` go to the solver, and `seed` to random rounding.
    `options` ("save", "cheap", "inputs", "offload", "tiled"), `state` and `weights` ("device", "host", "disk") force ingredients: segments
    have only these options, optimizer state and weights only these places. Weights stay on the device unless that does not fit, or a
    sweep is faster by a tenth otherwise: then those of some segments live in the store and come for the calls that read them.

    `schedule` is a plan that `save_schedule` or `chunkft plan --json` wrote: it is run exactly, under its own budget, and refused with
    every difference named (`PlanMismatch`) for another model, batch, optimizer or torch.

    With `backend="inductor"`, what a kind of segments computes is compiled by Inductor when a step first needs it, once for all its
    segments and all positions of its slices, and used where it holds the bytes of the plan (see `eager_codes`).

    A `model` that is under `torch.compile` already is taken out of it. Around the result, `torch.compile` runs it as it is.

    Chunks are fixed here; the schedule is solved at the first training call (or `plan`), when shapes are known, and a budget that
    is too small is refused there with the smallest that would do. Raises `ValueError` for a malformed budget, a model with
    nothing to train, accumulation with immediate updates, and a precision that means nothing to the dtypes of its weights.
    """
    model = unwrapped(model)
    device = torch.empty(0, device=device).device if device is not None else _device_of(model)  # with its index
    plan = read_plan(schedule) if schedule is not None else None
    chosen = _precision(model, precision, plan)
    if plan is not None:
        accumulation, update = accumulation or plan.fingerprint.accumulating, _update_of(plan)
    if outputs not in ("loss", "all"):
        raise ValueError(f'outputs is "loss" or "all", not {outputs!r}')
    if update not in _UPDATES:
        raise ValueError(f'update is "held", "auto" or "immediate", not {update!r}')
    if accumulation and update == "immediate":
        raise ValueError(
            'accumulation=True adds up the gradients of several backwards, and update="immediate" applies each one alone; '
            'choose accumulation=False or update="held"'
        )
    if prefer not in ("time", "fresh"):
        raise ValueError(f'prefer is "time" or "fresh", not {prefer!r}')
    if backend not in ("eager", "inductor"):
        raise ValueError(f'backend is "eager" or "inductor", not {backend!r}')
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is at least 1, not {max_steps}")
    directory = Path(store) if store is not None else None
    solving = Solving(solve_seconds, seed, prefer, max_steps, tuple(options) if options else None, _places(state), _places(weights))
    budget_nbytes = _budget(budget, plan, device)
    wanted = Options(budget_nbytes, accumulation, outputs == "loss", directory, solving, _UPDATES[update], plan, chosen, backend)
    return ChunkedModule(model, device, wanted)


def _precision(model: nn.Module, given: str | None, plan: Plan | None) -> Precision:
    """The one given, that of the plan, or plain."""
    name = given or (plan.fingerprint.precision if plan is not None else Precision.PLAIN)
    if name not in tuple(Precision):
        raise ValueError(f"precision is {', '.join(Precision)}, not {name!r}")
    precision = Precision(name)
    precision.check([parameter.dtype for parameter in model.parameters() if parameter.requires_grad])
    return precision


def last_programs(model: "ChunkedModule") -> tuple[str, ...]:
    """What each step of the sweep runs, for the batch trained or planned last: its instructions, and the codes they call as Python.

    Raises `TrainingError` before there is a plan.
    """
    return model._session.programs()


def _places(names: Sequence[str] | None) -> tuple[Placement, ...] | None:
    """Places by name, in their own order."""
    if strange := [name for name in names or () if name not in tuple(Placement)]:
        raise ValueError(f"state and weights live at {', '.join(Placement)}, not at {strange[0]!r}")
    return tuple(place for place in Placement if place in names) if names else None


def _budget(budget: str | int | None, plan: Plan | None, device: torch.device) -> int:
    """The budget of the plan, or the one given; both only if they agree."""
    if plan is None:
        if budget is None:
            raise ValueError(f"compile needs a budget, or a schedule that has one; {FORMS}")
        return parse_budget(budget, device)
    planned = plan.schedule.budget_nbytes
    if budget is not None and parse_budget(budget, device) != planned:
        raise ValueError(f"the budget {budget!r} is not that of the schedule, {planned} bytes; leave budget out, or plan for it")
    return planned


def _update_of(plan: Plan) -> Literal["held", "auto", "immediate"]:
    """The `update` that allows what the plan's problem allowed."""
    allowed = set(plan.problem.updates)
    return "auto" if len(allowed) > 1 else "held" if Update.HELD in allowed else "immediate"


class ChunkedModule(nn.Module):
    """Behaves like the model it wraps, except that a training call computes the gradients of the active chunks only.

    `parameters()` yields chunk parameters named `fqn[start:stop]` (and frozen parameters as they are); `state_dict()`,
    `save_pretrained`, `generate` and any other attribute are the model's own. Calls under `torch.no_grad()` run the model as it is.
    Weights that live beside the device come for these calls and for methods, module by module, see `elsewhere.visiting`.
    """

    module: nn.Module
    """The model itself, with all of its weights, and what `compile` changes nothing of."""

    def __new__(cls, model: nn.Module, device: torch.device, options: Options) -> "ChunkedModule":
        return super().__new__(showing_forward_of(type(model), cls))

    @property  # type: ignore[misc]
    def __class__(self) -> type[nn.Module]:  # type: ignore[override]
        """That of the model, see `appearance`."""
        return type(self.module)

    def __init__(self, model: nn.Module, device: torch.device, options: Options) -> None:
        super().__init__()
        self.module = model
        self.training = model.training
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no trainable parameter (requires_grad is False everywhere): nothing to compile")
        self._device = device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._session = Session(model, device, options, self._anchor)
        self._pending: weakref.ref[Run] | None = None

    @property
    def budget_nbytes(self) -> int:
        """The budget in bytes."""
        return self._session.options.budget_nbytes

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in the order of the model's parameters."""
        return self._session.chunks

    @property
    def schedule(self) -> Schedule | None:
        """The current schedule, with exact peaks; None before the first plan."""
        return self._session.sweep.schedule if self._session.sweep else None

    @property
    def problem(self) -> Problem | None:
        """The planner's problem for the signature that was trained or planned last; None before the first plan."""
        return self._session.problem

    @property
    def progress(self) -> Progress:
        """The step that the next training call belongs to. Raises `TrainingError` before there is a plan."""
        sweep = self._session.planned
        names = tuple(self.chunks[number].name for number in sweep.current.chunks)
        return Progress(sweep.position, len(sweep.schedule.steps), sweep.count, names, sweep.current.peak_nbytes)

    @property
    def counts(self) -> Counts:
        """How many captures, plans and lowered codes there were so far."""
        return self._session.counts

    @property
    def dense_parameters(self) -> tuple[str, ...]:
        """Split parameters whose gradient is computed whole because no slicing rule applies; empty before there is a plan."""
        return self._session.dense_parameters()

    @property
    def eager_codes(self) -> tuple[str, ...]:
        """With `backend="inductor"`, the codes so far that run as they are, each with the reason."""
        return self._session.inductor.eager_codes if self._session.inductor else ()

    @property
    def compiled_codes(self) -> int:
        """With `backend="inductor"`, how many codes so far run as Inductor compiled them."""
        return self._session.inductor.compiled_codes if self._session.inductor else 0

    @property
    def store_nbytes(self) -> int:
        """Bytes of optimizer state, weights and saved values in the stores."""
        return self._session.stores.nbytes

    @property
    def traffic(self) -> Traffic:
        """What has gone to the stores and come from them so far, and how long computing waited for it."""
        return self._session.stores.traffic

    @property
    def in_forward(self) -> bool:
        """Whether a training forward waits for its backward."""
        run = self._pending() if self._pending else None
        return run is not None and not run.finished

    @property
    def rounding_generator(self) -> torch.Generator | None:
        """What draws the bits of stochastic rounding: keep its `get_state()` in a checkpoint, `set_state()` when resuming.

        None unless precision is "stochastic".
        """
        return self._session.rounding.generator

    def adopt_optimizers(self) -> None:
        """From now on, optimizers over the model's own parameters get the chunks in their place, and their state with them."""
        self._session.adopt_optimizers()

    def save_schedule(self, path: str | Path) -> None:
        """Write the current schedule, its problem and the fingerprint of what it is for as JSON, in one move.

        A file that is there is replaced. Raises `TrainingError` before there is a plan.
        """
        session = self._session
        schedule = session.planned.schedule
        assert session.latest is not None, "a plan belongs to a signature"
        assert session.problem is not None, "a plan answers a question"
        write_plan(kept(session.latest, session.problem, schedule), path)

    def plan(self, *args: Any, **kwargs: Any) -> Schedule:
        """Capture and solve for a batch of this shape without training. Same arguments as a training call.

        Peaks of the schedule are bytes and exact, times are microseconds, added up from operators that were measured. Raises
        `BudgetError` with the smallest budget that does, and `CaptureError` where the model cannot be one graph.
        """
        autocast = Autocast.ambient(self._device)
        with autocast.off():
            self._session.plan(self._session.fit(args, self._training_kwargs(kwargs), autocast).compiled)
        return self._session.planned.schedule

    def plain_peak_nbytes(self, *args: Any, **kwargs: Any) -> int:
        """Computed peak, in bytes, of plain training with the same optimizer on a batch of this shape: everything dense and on the device.

        Raises `CaptureError` where the model cannot be one graph.
        """
        autocast = Autocast.ambient(self._device)
        with autocast.off():
            return self._session.compiled_for(args, self._training_kwargs(kwargs), autocast).plain_peak_nbytes()

    @untraced("the engine of a chunked model runs a program of its own")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. With gradients enabled, its outputs are connected to the active chunks of the current step."""
        if not torch.is_grad_enabled():
            with visiting(self.module, self._device):
                return self.module(*args, **kwargs)
        self._refuse_overlap()
        self._refuse_frozen()
        autocast = Autocast.ambient(self._device)
        with autocast.off():
            return self._train(args, self._training_kwargs(kwargs), autocast)

    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: Autocast) -> Any:
        session = self._session
        start = session.start(args, kwargs, autocast)
        compiled, step, assembled = start.compiled, start.step, start.assembled
        batch = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        tangents = compiled.capture.tangents
        sources = {v: self._source(compiled, node, batch) for v, node in assembled.bindings.items() if node not in tangents}
        sources = {value: tensor for value, tensor in sources.items() if value not in assembled.streamed}
        offloader = Offloader(session.stores)
        leaves, stepper = {number: self.chunks[number].leaf for number in step.chunks}, session.stepper(compiled, step)
        watch = session.watch(compiled, step, exact=start.exact)
        run = Run(
            assembled.program,
            start.calls,
            sources,
            leaves,
            stepper,
            offloader,
            session.keeper,
            assembled.streamed,
            watch,
            exact=start.exact,
        )
        self._pending = weakref.ref(run)
        return self._connect(compiled, assembled, run, batch)

    def _connect(self, compiled: Compiled, assembled: Assembled, run: Run, batch: Sequence[torch.Tensor]) -> Any:
        """Run the forward and hand its outputs to autograd, so that `backward()` on them starts the step's backward."""
        found, written = compiled.capture.outputs, assembled.outputs
        places = [i for i, leaf in enumerate(found) if isinstance(leaf, fx.Node) and leaf in written]
        arrivals = {
            compiled.capture.tangents[node]: value for value, node in assembled.bindings.items() if node in compiled.capture.tangents
        }

        def forward() -> list[torch.Tensor]:
            held = run.forward()
            for name, node in compiled.capture.mutations.items():
                self.module.get_buffer(name).copy_(held[written[node]])
            return [held[written[found[i]]] for i in places]

        tensors = _Step.apply(self._anchor, run, forward, [arrivals.get(i) for i in places])  # type: ignore[no-untyped-call]
        leaves = [self._source(compiled, leaf, batch) if isinstance(leaf, fx.Node) and leaf not in written else leaf for leaf in found]
        for place, tensor in zip(places, tensors, strict=True):
            leaves[place] = tensor
        return compiled.capture.rebuild(leaves)

    def _source(self, compiled: Compiled, node: fx.Node, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor behind a placeholder of the joint graph."""
        found = compiled.capture
        if node in found.params:
            return self.module.get_parameter(found.params[node]).detach()
        if node in found.buffers:
            return self.module.get_buffer(found.buffers[node])
        if node in found.inputs:
            return batch[found.inputs[node]].detach()
        return found.constants[node]

    def _training_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without a key-value cache: it is an output that training does not keep, and filling it copies keys and values."""
        if "use_cache" in kwargs or getattr(getattr(self.module, "config", None), "use_cache", None) is None:
            return kwargs  # where the config says False it is passed nevertheless: the Trainer changes that, and it is no other call
        return {**kwargs, "use_cache": False} if "use_cache" in inspect.signature(self.module.forward).parameters else kwargs

    def _refuse_overlap(self) -> None:
        if self.in_forward:
            raise TrainingError(
                "a second training forward before the backward of the first: both would keep their saved values. "
                "Call loss.backward() first, drop the first loss (del loss), or run evaluation under torch.no_grad()"
            )

    def _refuse_frozen(self) -> None:
        for chunk in self.chunks:
            if not (chunk.leaf.requires_grad and chunk.weight.requires_grad):
                raise TrainingError(f"{chunk.name} was frozen after compile(); freeze parameters before compile(), or compile again")

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Chunk parameters as `fqn[start:stop]`, then frozen parameters under their own names."""
        dot = prefix + "." if prefix else ""
        for chunk in self.chunks:
            yield dot + chunk.name, chunk.leaf
        trained = {chunk.param for chunk in self.chunks}
        for name, parameter in self.module.named_parameters(remove_duplicate=remove_duplicate):
            if name not in trained and not parameter.requires_grad:
                yield dot + name, parameter

    def __repr__(self) -> str:
        return f"ChunkedModule({self.module!r})"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's own. `assign` is refused: it would leave the chunks with the old memory."""
        if assign:
            raise ValueError(
                "load_state_dict(assign=True) would part the weights from their chunks; load without assign, or before compile()"
            )
        return self.module.load_state_dict(state_dict, strict)

    def train(self, mode: bool = True) -> "ChunkedModule":
        """Set the mode of the model; another mode is captured anew at the next training call."""
        self.training = mode
        self.module.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__.get("_modules", {}):
                raise
            return self._brought(name, getattr(super().__getattr__("module"), name))

    def _brought(self, name: str, found: Any) -> Any:
        """An attribute of the model as it is, except where its weights may live beside the device: methods bring them where they run it."""
        if self._device.type == "cpu":  # all weights can be read where they are
            return found
        if name == "device" and isinstance(found, torch.device):
            return self._device
        if not (inspect.ismethod(found) and found.__self__ is self.module):
            return found
        # transformers' `generate` makes its tensors where the first parameter is
        return bringing(found, self._device, self.budget_nbytes, first=name == "generate")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChunkedModule":
        raise TypeError(
            "a compiled model cannot be copied: its chunks share memory with the weights. copy.deepcopy(model.module) copies the model"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ChunkedModule":
        """`.to()`, `.half()` and the like, as long as they change nothing. To the device of `compile()` weights go as the plan says."""
        for name, parameter in self.module.named_parameters():
            sample = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            moved = fn(sample)
            if moved.dtype != sample.dtype or moved.device not in (sample.device, self._device):
                raise RuntimeError(
                    f"{name} would go from {sample.dtype} on {sample.device} to {moved.dtype} on {moved.device}, away from its chunks; "
                    f"move or cast the model before compile()"
                )
        return self


class _Step(torch.autograd.Function):
    """One node of autograd's graph for the whole model; its backward is the program's."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, run: Run, forward: Callable[[], list[torch.Tensor]], arrivals: list[int | None]
    ) -> tuple[torch.Tensor, ...]:
        outputs = forward()
        ctx.run, ctx.arrivals, ctx.device = run, arrivals, anchor.device
        ctx.like = [(output.shape, output.dtype, output.device) for output in outputs]
        ctx.mark_non_differentiable(*[output for output, value in zip(outputs, arrivals, strict=True) if value is None])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @untraced("autograd calls it from within a compiled training step")
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        if ctx.run.finished:
            raise TrainingError("backward() was already called on this loss; its saved values are gone. Run the forward again")
        tangents = {}
        for value, gradient, (shape, dtype, device) in zip(ctx.arrivals, gradients, ctx.like, strict=True):
            if value is not None:
                # the plan counts its bytes; that of a sum is one number expanded, and operators would copy it on their own account
                tangents[value] = gradient.contiguous() if gradient is not None else torch.zeros(shape, dtype=dtype, device=device)
        with Autocast.ambient(ctx.device).off():
            ctx.run.backward(tangents)
        return None, None, None, None


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"the parameters of {type(model).__name__} are on {sorted(map(str, devices)) or 'no device'}; compile needs them all on one"
        )
    return devices.pop()
