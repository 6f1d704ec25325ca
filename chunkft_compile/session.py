"""The state of one compiled model between calls: captured signatures, the schedule, the position in the sweep."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.assembly import Assembled
from chunkft_compile.autocasting import Autocast
from chunkft_compile.budget import format_nbytes
from chunkft_compile.compiled import Compiled, Setting, layouts_of, model_nbytes
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.errors import BudgetError, TrainingError
from chunkft_compile.inductor import Inductor
from chunkft_compile.making import ModelMaker, check_devices
from chunkft_compile.optimizing import Optimizing
from chunkft_compile.planner import Placement, Plan, Problem, Step, Update, smallest_budget
from chunkft_compile.planner.grounds import settle
from chunkft_compile.planner.options import choose_options
from chunkft_compile.planner.program import Instruction
from chunkft_compile.readable import readable
from chunkft_compile.resuming import Standing, choices, fitting, refuse_part, translated
from chunkft_compile.run_writer import Recording, Running
from chunkft_compile.runtime.chunks import Chunk, split_for_budget
from chunkft_compile.runtime.engine import Call, Stepper
from chunkft_compile.runtime.garbage import collected_once
from chunkft_compile.runtime.guard import Watch, open_guard
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.precision import Precision, Rounding
from chunkft_compile.runtime.stores import Stores, measure_link
from chunkft_compile.runtime.sweep import Sweep, SweepState
from chunkft_compile.runtime.updates import Updater
from chunkft_compile.runtime.weights import WeightKeeper
from chunkft_compile.signatures import Counts, Fit, Signatures
from chunkft_compile.solving import Solving, explained_error, forms, given, kept, solve, standing_plan
from chunkft_compile.tracing import trace_plan, trace_program

logger = logging.getLogger("chunkft_compile")


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
    backend: str = "eager"


@dataclass(frozen=True, eq=False)
class Start:
    """A training call under way: `calls` are what the instructions of `assembled` index.

    Unless `exact`, the batch is smaller than the one that the program was made for.
    """

    compiled: Compiled
    step: Step
    assembled: Assembled
    calls: Sequence[Call]
    exact: bool


class Session:
    """Captures, plans and follows the sweep. `anchor` is the tensor that connects a step to autograd; it counts as batch."""

    def __init__(self, model: nn.Module, device: torch.device, options: Options, anchor: torch.Tensor) -> None:
        self.model = model
        self.options = options
        self.rounding = Rounding(options.precision, device, options.solving.seed)
        self.device = device
        self.chunks = self._split(options.budget_nbytes)
        self.accumulating = options.accumulation
        self.sweep: Sweep | None = None
        self.latest: Compiled | None = None
        self.problem: Problem | None = None
        self.stores = Stores(device, options.directory)
        self.keeper = WeightKeeper(model, self.chunks, self.stores, device)
        self._number = {id(chunk): number for number, chunk in enumerate(self.chunks)}
        self.steps = 0
        self.guard = open_guard(device, [chunk.name for chunk in self.chunks], [*model.parameters(), *model.buffers()])
        self.recording: Recording | None = None
        self._watch = Watch()
        self._costs = OperatorCosts(device)
        maker = ModelMaker(
            model,
            device,
            self.chunks,
            self._costs,
            _weakly(self, "_get_setting"),
            nbytes=model_nbytes(model, device) + self.keeper.nbytes,
            anchor=anchor,
            precision=options.precision,
            loss_only=options.loss_only,
        )
        self.signatures = Signatures(maker)
        self._plans = 0
        self.inductor = Inductor(device, self._costs.temporary_nbytes) if options.backend == "inductor" else None
        self._traced: weakref.WeakSet[Assembled] = weakref.WeakSet()
        self._setting: Setting | None = None
        self.mover = StateMover(self.stores, device, _weakly(self, "_state_place"), self.keeper)
        self._loaded: Standing | None = None  # of a checkpoint, until the first training call says for which signature
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # gradients that were stepped, with their versions
        self._updater = Updater(
            self.chunks,
            self.mover,
            program=_weakly(self, "_update_program"),
            resident=_weakly(self, "_resident"),
            done=_weakly(self, "_stepped"),
            watch=_weakly(self, "_latest_watch"),
            rounding=self.rounding,
        )
        self._optimizing = Optimizing(self.chunks, device, options.precision, self._updater, self.mover)

    @property
    def planned(self) -> Sweep:
        """The sweep. Raises `TrainingError` before there is a plan."""
        if self.sweep is None:
            raise TrainingError("there is no plan yet: call model.plan(**batch), or train one batch")
        return self.sweep

    def adopt_optimizers(self) -> None:
        """From now on, optimizers over the model's own parameters get the chunks in their place."""
        self._updater.adopts = True

    def fit(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> Fit:
        """What a batch like this one runs on, see NOTE [sizes that one plan serves]."""
        check_devices(self.device, args, kwargs)
        return self.signatures.fit(args, kwargs, autocast)

    def compiled_for(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> Compiled:
        """What is compiled for exactly the sizes of this batch."""
        check_devices(self.device, args, kwargs)
        return self.signatures.exact(args, kwargs, autocast)

    def start(self, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast) -> Start:
        """A training call: its step, planned as needed, and what the program of the step calls."""
        fit = self.fit(args, kwargs, autocast)
        step = self.begin(fit.compiled)
        assembled = self.program(fit.compiled, step)
        calls = self.calls(fit, assembled)
        if calls is not None:
            return Start(fit.compiled, step, assembled, calls, exact=fit.twin is None)
        self.signatures.refuse(args, kwargs, autocast)
        return self.start(args, kwargs, autocast)

    @property
    def counts(self) -> Counts:
        """What was captured, planned and lowered so far."""
        return self.signatures.counts(self._plans)

    def plan(self, compiled: Compiled) -> None:
        """Make sure that every step of the schedule holds the budget on this signature."""
        self._take_up(compiled)
        if self.sweep is None or not all(self._fits(compiled, step) for step in self.sweep.schedule.steps):
            self._solve(compiled)
        self._updater.settle()

    def begin(self, compiled: Compiled) -> Step:
        """The step that a training call on this signature belongs to; plans, and plans again, as needed."""
        self.settle()
        self._take_up(compiled)
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
            if self.problem is not None:  # a schedule that still fits is kept, and is one for this question now
                self.problem = replace(self.problem, accumulating=True, updates=(Update.HELD,))
        clashes = self.accumulating and any(step.update is Update.IMMEDIATE for step in self.planned.schedule.steps)
        if clashes or not self._fits(compiled, self.planned.current):
            if held:
                self._shrink(compiled, sorted(held))
            else:
                logger.info("the current step does not fit this batch: planning again")
                self._solve(compiled)
        self._updater.settle()
        self.latest = compiled
        return self.planned.current

    def settle(self) -> None:
        """Clear up after an error. Raises `TrainingError` between an IMMEDIATE backward and its `optimizer.step()`."""
        self._updater.recover()
        self.keeper.release()
        self._updater.refuse_unfinished()

    @property
    def held(self) -> frozenset[int]:
        """Chunks with a gradient that no optimizer step has used: between the backwards of one step."""
        found = set()
        for number, chunk in enumerate(self.chunks):
            reference, version = self._used.get(number, (None, 0))
            gradient = chunk.leaf.grad
            # `_version` (torch 2.13.0) counts changes in place: by a further backward, or by zeroing
            if gradient is not None and not (reference is not None and reference() is gradient and version == gradient._version):
                found.add(number)
        return frozenset(found)

    def standing(self) -> Standing:
        """Where training stands, to go on from with `resume`."""
        if self._loaded is not None:
            return replace(self._loaded, accumulating=self.accumulating)
        if self.sweep is None or self.latest is None:
            return Standing(self.steps, self._names, choices(self.options), self.accumulating, SweepState(), None)
        assert self.problem is not None, "a sweep has a plan"
        plan = standing_plan(self.latest, self.problem, self.sweep.schedule)
        return Standing(self.steps, self._names, choices(self.options), self.accumulating, self.sweep.state, plan)

    def check(self, standing: Standing, *, held: bool) -> None:
        """Raise `CheckpointError` where `resume` could not go on from there; `held`: gradients of an unfinished step come with it."""
        if held:
            refuse_part(standing, self._names, choices(self.options))

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(chunk.name for chunk in self.chunks)

    def resume(self, standing: Standing) -> None:
        """Go on from there, under its own plan if it was made for the same choices and chunks. What is under way is dropped."""
        self._updater.forget()
        self.keeper.release()
        self._used = {}
        self._loaded = translated(standing, self._names, choices(self.options))
        self.sweep, self.steps = None, standing.steps
        self.accumulating = self.options.accumulation or standing.accumulating

    def stepper(self, compiled: Compiled, step: Step) -> Stepper:
        """What does the optimizer's part of a step inside its backward."""
        if step.update is Update.HELD:
            return self._updater.fetcher()
        optimizers = self._updater.optimizers()
        if not optimizers:
            raise TrainingError(
                'update="immediate" updates weights inside backward, and there is no optimizer over the chunks yet; build it from '
                'model.parameters() before the first training call, or hold the gradients: compile(..., update="held")'
            )
        for optimizer in optimizers:
            if not self._optimizing.knows(optimizer):
                self._optimizing.adopt(optimizer, compiled.setting.optimizer)
        return self._updater.applier(optimizers)

    def program(self, compiled: Compiled, step: Step) -> Assembled:
        """The exact program of a step under the current schedule."""
        return compiled.program(step, self.planned.schedule.places, accumulating=self.accumulating)

    def calls(self, fit: Fit, assembled: Assembled) -> Sequence[Call] | None:
        """What to call for each code of a program that is about to run; None where there are no codes for the batch.

        Inductor compiles for the sizes of the program: smaller batches run the codes as they are.
        """
        names = [segment.name for segment in fit.compiled.segments]
        if assembled not in self._traced:
            self._traced.add(assembled)
            trace_program(assembled, names)
        return fit.calls(assembled) if self.inductor is None or fit.twin is not None else self.inductor.calls(assembled, names)

    def watch(self, compiled: Compiled, step: Step, *, exact: bool = True) -> Watch:
        """What the run of a step, or of its updates, reports to. Unless `exact`, the batch is smaller than the planned one."""
        planned, accumulating = self.planned, self.accumulating
        timeline = compiled.timeline(step, planned.schedule.places, accumulating=accumulating)
        assembled = self.program(compiled, step)
        program = assembled.program
        without_state = self._updater.without_state()
        absent_nbytes = compiled.setting.absent_nbytes(without_state, planned.schedule.resident)
        unmade = {number: compiled.setting.state_nbytes(number) for number in without_state.intersection(step.chunks)}
        if accumulating:
            absent_nbytes += sum(nbytes for number, nbytes in program.grad_nbytes.items() if self.chunks[number].leaf.grad is None)
        title = f"step {planned.position + 1} of {len(planned.schedule.steps)}, sweep {planned.count + 1}"
        watch = self.guard.watch(program, timeline, title, absent_nbytes, unmade)
        if self.recording is not None:
            assert self.problem is not None, "a plan answers a question"
            running = Running(compiled, self.problem, planned.schedule, step, assembled, number=self.steps, sweep=planned.count)
            watch = self.recording.watch(watch, running, exact=exact)
        self._watch = watch
        return watch

    def programs(self) -> tuple[str, ...]:
        """What each step of the sweep runs. Raises `TrainingError` before there is a plan."""
        schedule, compiled = self.planned.schedule, self.latest
        if compiled is None:
            raise TrainingError("there is no program yet: call model.plan(**batch), or train one batch")
        names = [segment.name for segment in compiled.segments]
        return tuple(readable(self.program(compiled, step), names) for step in schedule.steps)

    def dense_parameters(self) -> tuple[str, ...]:
        """Split parameters whose gradient is computed whole because no slicing rule applies."""
        if self.latest is None or self.sweep is None:
            return ()
        programs = [self.program(self.latest, step) for step in self.sweep.schedule.steps]
        return tuple(sorted({name for program in programs for name in program.dense}))

    def _split(self, budget_nbytes: int) -> tuple[Chunk, ...]:
        wide = self.options.precision is not Precision.PLAIN
        return split_for_budget(self.model, budget_nbytes, wide=wide, device=self.device)

    def _get_setting(self) -> Setting:
        """Costs that do not depend on the batch, measured once the user's optimizers can be found."""
        if self._setting is None:
            cost = self._optimizing.planned()
            links = tuple(measure_link(self.device, self.options.directory, place) for place in self._places())
            chosen = self.options
            self._setting = Setting(
                chosen.budget_nbytes, self.chunks, cost, links, chosen.updates, self.device.type, precision=chosen.precision
            )
        return self._setting

    def _places(self) -> list[Placement]:
        """Where the plan may put things: the fastest store, and those that were asked for."""
        solving, plan = self.options.solving, self.options.plan
        asked = {*(solving.state or ()), *(solving.weights or ())}
        if plan is not None:
            asked |= {*plan.schedule.places.state, *plan.schedule.places.weights}
        return [place for place in self.stores.placements if place in asked or place is self.stores.placements[0]]

    def _take_up(self, compiled: Compiled) -> None:
        """Go on from a loaded checkpoint, now that there is a signature."""
        loaded = self._loaded
        if loaded is None:
            return
        if fitting(compiled, loaded, accumulating=self.accumulating):
            assert loaded.plan is not None
            self._follow(compiled, loaded.plan.problem, Sweep.at(loaded.plan.schedule, loaded.state))
        elif self.held:
            raise TrainingError(
                "the checkpoint holds gradients of an unfinished step, and its plan is not one for this model and batch; "
                "call optimizer.zero_grad() to drop them and go on"
            )
        else:
            self._solve(compiled)
        self._loaded = None

    def _follow(self, compiled: Compiled, problem: Problem, sweep: Sweep) -> None:
        """Go on under the schedule of `sweep`, which answers `problem`: weights go where it says."""
        self._plans += 1
        self.sweep, self.latest, self.problem = sweep, compiled, problem
        self.keeper.place(compiled.weight_places(sweep.schedule.places))

    def _solve(self, compiled: Compiled) -> None:
        """Solve for this signature; a sweep under way goes on with the chunks it has not trained yet."""
        if self.options.plan is not None:
            problem, schedule = self.options.plan.problem, given(compiled, self.options.plan, accumulating=self.accumulating)
        else:
            try:
                with collected_once():
                    problem, schedule = solve(compiled, self.options.solving, accumulating=self.accumulating)
            except BudgetError as error:
                solving = self.options.solving
                if solving.forced or (solving.max_steps is not None and error.smallest_nbytes <= self.options.budget_nbytes):
                    raise  # there may be schedules, none with these ingredients or so few steps
                raise self._budget_error(compiled) from None
        state = self.sweep.state if self.sweep else self._loaded.state if self._loaded else SweepState()
        self._follow(compiled, problem, Sweep.after(schedule, state))
        trace_plan(lambda: kept(compiled, problem, schedule))
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
        solving = self.options.solving
        problem = forms(compiled, solving, accumulating=self.accumulating)[-1]
        budget, setting, tried = smallest_budget(problem)[0], compiled.setting, set[int]()
        while True:
            chunks = self._split(budget)
            if set(layouts_of(chunks)) == set(layouts_of(setting.chunks)):
                return explained_error(compiled, problem, self.model)
            tried.add(budget)
            setting = replace(setting, chunks=chunks, optimizer=self._optimizing.of_chunks(chunks))
            compiled = compiled.under(setting)
            problem = forms(compiled, solving, accumulating=self.accumulating)[-1]
            needed = smallest_budget(problem)[0]
            budget = needed if needed not in tried else max(tried)

    def _fits(self, compiled: Compiled, step: Step) -> bool:
        """Whether a step holds the budget on this signature. No IMMEDIATE step does where gradients are kept over several backwards."""
        if self.accumulating and step.update is Update.IMMEDIATE:
            return False
        places = self.planned.schedule.places
        if not compiled.offers(step):
            return False
        return compiled.timeline(step, places, accumulating=self.accumulating).peak_nbytes <= self.options.budget_nbytes

    def _shrink(self, compiled: Compiled, held: list[int]) -> None:
        """Gradients are held and the step no longer fits: plan again, and go on with the part of the step that fits.

        The other gradients of this step are dropped; their chunks are trained in a later step of the same sweep.
        """
        self._solve(compiled)
        problem = forms(compiled, self.options.solving, accumulating=True)[-1]
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
        if compiled is None:
            raise TrainingError(
                "the gradients are those of a checkpoint made right before optimizer.step(), and there is no batch yet to know the plan "
                "by; call model.plan(**batch) first"
            )
        if not self._optimizing.knows(optimizer):
            self._updater.check_coverage()
            self._optimizing.adopt(optimizer, compiled.setting.optimizer)
        self.watch(compiled, self.planned.current)
        return self.program(compiled, self.planned.current).program.instructions

    def _state_place(self, chunk: Chunk) -> Placement:
        """Where the state of a chunk is sent: to its place, or out of the way if it should be on the device."""
        place = self.planned.schedule.places.state[self._number[id(chunk)]] if self.sweep else Placement.DEVICE
        return self.stores.placements[0] if place is Placement.DEVICE else place

    def _latest_watch(self) -> Watch:
        return self._watch

    def _resident(self) -> frozenset[int]:
        return frozenset(self.sweep.schedule.resident) if self.sweep else frozenset()

    def _stepped(self, numbers: frozenset[int]) -> None:
        """Chunks were stepped; when all active ones were, the sweep moves on, and gradients of chunks that leave are freed."""
        before = set(self.planned.current.chunks)
        gradients = {number: gradient for number in numbers if (gradient := self.chunks[number].leaf.grad) is not None}
        self._used |= {number: (weakref.ref(gradient), gradient._version) for number, gradient in gradients.items()}
        if self.planned.stepped(numbers):
            self.steps += 1
            self.guard.log.finish()
            if self.recording is not None:
                self.recording.complete(self.stores.traffic)
            for number in before - set(self.planned.current.chunks):
                self.chunks[number].leaf.grad = None


def _weakly(session: Session, method: str) -> Callable[..., Any]:
    """A bound method that does not keep the session alive: optimizer hooks are global and outlive it."""
    reference = weakref.ref(session)
    return lambda *arguments: getattr(reference(), method)(*arguments)
