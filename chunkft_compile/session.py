"""The state of one compiled model between calls: captured signatures, the schedule, the position in the sweep."""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from chunkft_compile.assembly import Assembled
from chunkft_compile.autocasting import Autocast
from chunkft_compile.budget import format_nbytes
from chunkft_compile.capture import capture
from chunkft_compile.compiled import Compiled, Setting, fixed_nbytes, layouts_of
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.errors import BudgetError, TrainingError
from chunkft_compile.planner import Plan, Step, Update, smallest_budget
from chunkft_compile.planner.grounds import settle
from chunkft_compile.planner.options import choose_options
from chunkft_compile.planner.program import Instruction
from chunkft_compile.runtime.chunks import Chunk, split_for_budget
from chunkft_compile.runtime.immediate import Applier
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.optimizers import OptimizerCost
from chunkft_compile.runtime.precision import Precision, Rounding
from chunkft_compile.runtime.precision_costs import measure_update
from chunkft_compile.runtime.store import measure_link, open_store
from chunkft_compile.runtime.sweep import Sweep
from chunkft_compile.runtime.updates import Updater
from chunkft_compile.solving import Solving, describe_inputs, explained_error, given, solve
from chunkft_compile.widening import widen_gradients

logger = logging.getLogger("chunkft_compile")

_SIGNATURES = 8  # captured signatures kept; one holds a graph of some ten megabytes for a large model


@dataclass(frozen=True)
class Options:
    """What the user chose; see `chunkft_compile.compile`."""

    budget_nbytes: int
    accumulation: bool
    loss_only: bool
    directory: Path | None
    solving: Solving
    updates: tuple[Update, ...] = (Update.HELD,)
    plan: Plan | None = None
    precision: Precision = Precision.PLAIN


class Session:
    """Captures, plans and follows the sweep. `anchor` is the tensor that connects a step to autograd; it counts as batch."""

    def __init__(self, model: nn.Module, device: torch.device, options: Options, anchor: torch.Tensor) -> None:
        self.model = model
        self.options = options
        self.rounding = Rounding(options.precision, device, options.solving.seed)
        self.chunks = self._split(options.budget_nbytes)
        self.device = device
        self.accumulating = options.accumulation
        self.sweep: Sweep | None = None
        self.latest: Compiled | None = None
        self.store = open_store(device, options.directory)
        self._anchor = anchor
        self._costs = OperatorCosts(device)
        self._compiled: OrderedDict[object, Compiled] = OrderedDict()
        self._setting: Setting | None = None
        self._known: frozenset[type[Optimizer]] = frozenset()
        self._updater = Updater(
            self.chunks,
            StateMover(self.store),
            program=_weakly(self, "_update_program"),
            resident=_weakly(self, "_resident"),
            done=_weakly(self, "_stepped"),
            rounding=self.rounding,
        )

    @property
    def planned(self) -> Sweep:
        """The sweep. Raises `TrainingError` before there is a plan."""
        if self.sweep is None:
            raise TrainingError("there is no plan yet: call model.plan(**batch), or train one batch")
        return self.sweep

    def compiled_for(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> Compiled:
        """What is compiled for a batch like this one, made anew for a new signature, mode or autocast."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self._check_devices(leaves)
        signature = tuple((tuple(v.shape), v.dtype, v.stride()) if isinstance(v, torch.Tensor) else repr(v) for v in leaves)
        key = (str(spec), signature, tuple(module.training for module in self.model.modules()), autocast)
        if key not in self._compiled:
            with autocast.on():
                found = capture(self.model, args, kwargs, loss_only=self.options.loss_only)
            found = widen_gradients(found, self.options.precision)
            self._check_all_trained(found.gradients)
            batch = [self._anchor, *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]
            stand_ins = [chunk.stand_in for chunk in self.chunks if chunk.stand_in is not None]
            fixed = fixed_nbytes(self.model, found, [*batch, *stand_ins])
            self._compiled[key] = Compiled(found, fixed, self._costs, self._get_setting(), describe_inputs(args, kwargs))
            while len(self._compiled) > _SIGNATURES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def plan(self, compiled: Compiled) -> None:
        """Make sure that every step of the schedule holds the budget on this signature."""
        if self.sweep is None or not all(self._fits(compiled, step) for step in self.sweep.schedule.steps):
            self._solve(compiled)

    def begin(self, compiled: Compiled) -> Step:
        """The step that a training call on this signature belongs to; plans, and plans again, as needed."""
        self._updater.recover()
        self._updater.refuse_unfinished()
        held = {number for number, chunk in enumerate(self.chunks) if chunk.leaf.grad is not None}
        if self.sweep is None:
            self._solve(compiled)
        self.sweep = self.planned.resumed() if self.planned.current.update is Update.IMMEDIATE else self.planned
        held &= set(self.sweep.current.chunks)
        if held and self.sweep.current.update is Update.IMMEDIATE:
            raise TrainingError(
                f"{self.chunks[min(held)].name} has a gradient from before, and this step applies each gradient alone inside backward; "
                f'call optimizer.zero_grad(), or hold gradients: compile(..., accumulation=True, update="held")'
            )
        if held:
            self.accumulating = True
        clashes = self.accumulating and any(step.update is Update.IMMEDIATE for step in self.planned.schedule.steps)
        if clashes or not self._fits(compiled, self.planned.current):
            if held:
                self._shrink(compiled, sorted(held))
            else:
                logger.info("the current step does not fit this batch: planning again")
                self._solve(compiled)
        self.latest = compiled
        return self.planned.current

    def applier(self, compiled: Compiled, step: Step) -> Applier | None:
        """What updates the chunks of an IMMEDIATE step inside its backward; None for a HELD one."""
        if step.update is Update.HELD:
            return None
        optimizers = self._updater.optimizers()
        if not optimizers:
            raise TrainingError(
                'update="immediate" updates weights inside backward, and there is no optimizer over the chunks yet; build it from '
                'model.parameters() before the first training call, or hold the gradients: compile(..., update="held")'
            )
        for optimizer in optimizers:
            if type(optimizer) not in self._known:
                self._adopt(optimizer, compiled.setting.optimizer)
        return self._updater.applier(optimizers)

    def program(self, compiled: Compiled, step: Step) -> Assembled:
        """The exact program of a step under the current schedule."""
        return compiled.program(step, resident=self.planned.schedule.resident, accumulating=self.accumulating)

    def dense_parameters(self) -> tuple[str, ...]:
        """Split parameters whose gradient is computed whole because no slicing rule applies."""
        if self.latest is None or self.sweep is None:
            return ()
        programs = [self.program(self.latest, step) for step in self.sweep.schedule.steps]
        return tuple(sorted({name for program in programs for name in program.dense}))

    def _split(self, budget_nbytes: int) -> tuple[Chunk, ...]:
        return split_for_budget(self.model, budget_nbytes, wide=self.options.precision is not Precision.PLAIN)

    def _get_setting(self) -> Setting:
        """Costs that do not depend on the batch, measured once the user's optimizers can be found."""
        if self._setting is None:
            found = self._updater.check_coverage()
            cost = self._measure(found, self.chunks)
            link = measure_link(self.device, self.options.directory)
            chosen = self.options
            self._setting = Setting(chosen.budget_nbytes, self.chunks, cost, link, chosen.updates, self.device.type, chosen.precision)
            self._known = frozenset(type(optimizer) for optimizer in found)
        return self._setting

    def _measure(self, optimizers: Sequence[Optimizer], chunks: Sequence[Chunk]) -> OptimizerCost:
        """What stepping `chunks` costs with the dearest of `optimizers`, or with AdamW where there is none yet."""
        layouts = layouts_of(chunks)
        worst = measure_update(optimizers[0] if optimizers else None, layouts, self.device, self.options.precision)
        for optimizer in optimizers[1:]:
            worst = worst.at_least(measure_update(optimizer, layouts, self.device, self.options.precision))
        return worst

    def _solve(self, compiled: Compiled) -> None:
        """Solve for this signature; a sweep under way goes on with the chunks it has not trained yet."""
        if self.options.plan is not None:
            schedule = given(compiled, self.options.plan, accumulating=self.accumulating)
        else:
            try:
                schedule = solve(compiled, self.options.solving, accumulating=self.accumulating)
            except BudgetError as error:
                solving = self.options.solving
                if solving.forced or (solving.max_steps is not None and error.smallest_nbytes <= self.options.budget_nbytes):
                    raise  # there may be schedules, none with these ingredients or so few steps
                raise self._budget_error(compiled) from None
        self.sweep = self.sweep.continued(schedule) if self.sweep else Sweep(schedule)
        self.latest = compiled
        if dense := self.dense_parameters():
            logger.warning("no slicing rule for the gradient of %s: it is computed whole and cut, and counted so", ", ".join(dense))
        logger.info(
            "planned %d chunks in %d steps: peak %s of %s, %s, gap %.1f%%, solved in %.1f s",
            len(self.chunks),
            len(schedule.steps),
            format_nbytes(schedule.peak_nbytes),
            format_nbytes(self.options.budget_nbytes),
            schedule.status,
            100 * schedule.gap,
            schedule.solve_s,
        )

    def _budget_error(self, compiled: Compiled) -> BudgetError:
        """The refusal of a budget. Another budget comes with other chunks, so the advice must hold for its own ones."""
        problem = compiled.problem(accumulating=self.accumulating)
        budget, setting, tried = smallest_budget(problem)[0], compiled.setting, set[int]()
        while True:
            chunks = self._split(budget)
            if set(layouts_of(chunks)) == set(layouts_of(setting.chunks)):
                return explained_error(compiled, problem, self.model)
            tried.add(budget)
            setting = replace(setting, chunks=chunks, optimizer=self._measure(self._updater.check_coverage(), chunks))
            compiled = compiled.under(setting)
            problem = compiled.problem(accumulating=self.accumulating)
            needed = smallest_budget(problem)[0]
            budget = needed if needed not in tried else max(tried)

    def _fits(self, compiled: Compiled, step: Step) -> bool:
        """Whether a step holds the budget on this signature. No IMMEDIATE step does where gradients are kept over several backwards."""
        if self.accumulating and step.update is Update.IMMEDIATE:
            return False
        resident = self.planned.schedule.resident
        if not compiled.offers(step):
            return False
        return compiled.timeline(step, resident=resident, accumulating=self.accumulating).peak_nbytes <= self.options.budget_nbytes

    def _shrink(self, compiled: Compiled, held: list[int]) -> None:
        """Gradients are held and the step no longer fits: plan again, and go on with the part of the step that fits.

        The other gradients of this step are dropped; their chunks are trained in a later step of the same sweep.
        """
        self._solve(compiled)
        problem = compiled.problem(accumulating=True)
        ground = settle(problem, self.planned.schedule.places)
        kept, options = held, None
        while kept and options is None:
            options = choose_options(ground, kept, self.options.budget_nbytes, Update.HELD)
            if options is None:
                kept = kept[1:]  # the lowest first: without them the step is shallower
        if options is None:
            raise BudgetError(
                f"no chunk of this step fits {format_nbytes(self.options.budget_nbytes)} beside the gradients of earlier micro-batches; "
                f"call model.zero_grad() and pass accumulation=True to compile()",
                smallest_nbytes=self.options.budget_nbytes + 1,
                binding="gradients of earlier micro-batches",
            )
        for number in set(held) - set(kept):
            self.chunks[number].leaf.grad = None
        self.sweep = self.planned.with_current(tuple(kept), options)
        logger.info("several backwards per optimizer step: planned again; this step trains %d of its %d chunks", len(kept), len(held))

    def _update_program(self, optimizer: Optimizer) -> Sequence[Instruction]:
        """The current step's instructions, for an optimizer that the plan knows."""
        compiled = self.latest
        assert compiled is not None, "gradients without a training call"
        if type(optimizer) not in self._known:
            self._updater.check_coverage()
            self._adopt(optimizer, compiled.setting.optimizer)
        return self.program(compiled, self.planned.current).program.instructions

    def _adopt(self, optimizer: Optimizer, assumed: OptimizerCost) -> None:
        """An optimizer built after the plan: hold its step to what was planned, before anything is changed."""
        cost = measure_update(optimizer, layouts_of(self.chunks), self.device, self.options.precision)
        more = max(cost.alone_nbytes(layout) - assumed.alone_nbytes(layout) for layout in cost.of_layout)
        if more > 0 or cost.overlap > assumed.overlap:
            raise TrainingError(
                f"the plan assumed {assumed.name}, and {cost.name} needs up to {format_nbytes(max(more, 1))} more for a chunk; "
                f"build the optimizer before the first training call, or before model.plan()"
            )
        self._known |= {type(optimizer)}

    def _resident(self) -> frozenset[int]:
        return frozenset(self.sweep.schedule.resident) if self.sweep else frozenset()

    def _stepped(self, numbers: frozenset[int]) -> None:
        """Chunks were stepped; when all active ones were, the sweep moves on, and gradients of chunks that leave are freed."""
        before = set(self.planned.current.chunks)
        if self.planned.stepped(numbers):
            for number in before - set(self.planned.current.chunks):
                self.chunks[number].leaf.grad = None

    def _check_all_trained(self, gradients: Mapping[str, fx.Node]) -> None:
        missing = sorted({chunk.param for chunk in self.chunks} - set(gradients))
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise TrainingError(
                f"no step would ever train {shown}: the outputs do not depend on it; freeze it before compile() with requires_grad_(False)"
            )

    def _check_devices(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device != self.device:
                raise ValueError(
                    f"an input of shape {tuple(leaf.shape)} is on {leaf.device}, the model is on {self.device}; "
                    f"move it: batch.to({str(self.device)!r})"
                )


def _weakly(session: Session, method: str) -> Callable[..., Any]:
    """A bound method that does not keep the session alive: optimizer hooks are global and outlive it."""
    reference = weakref.ref(session)
    return lambda *arguments: getattr(reference(), method)(*arguments)
