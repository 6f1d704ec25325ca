"""Codes compiled by Inductor: each once, however many layers share it, with the starts of its slices as inputs.

The plan counts the bytes of a code as it stands (`Footprint`). What Inductor makes of it fuses operators and reuses buffers, and may need
fewer bytes or more. So each result is *certified*: run on made-up inputs, it must give the same values, in storages that lie as before, and
need no more bytes above its inputs than the plan counts, for every set of inputs that a program lets it free. A code that fails stays as
it is. All that is private of Inductor is in `_lower`; checked on torch 2.13.0.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from chunkft_compile.assembly import Assembled
from chunkft_compile.budget import format_nbytes
from chunkft_compile.codes import Code
from chunkft_compile.liveness import storages
from chunkft_compile.planner.program import Op, Program
from chunkft_compile.runtime.engine import Call
from chunkft_compile.runtime.meter import PeakMeter

logger = logging.getLogger("chunkft_compile")

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far results may be off, relative to the norm of the eager ones: Inductor sums in another order, and fuses halves in fp32."""

Temporary = Callable[[fx.Node], int]


class Refusal(Exception):
    """Why a code is not run as Inductor compiled it."""


class Inductor:
    """Compiles codes when a step first needs them. `temporary` gives the bytes that the plan counts for temporaries inside an operator."""

    def __init__(self, device: torch.device, temporary: Temporary) -> None:
        self._device = device
        self._temporary = temporary
        self._made: dict[Code, Call] = {}
        self._refused: dict[Code, str] = {}
        self._certified: set[tuple[Code, frozenset[int]]] = set()
        self._calls: dict[Assembled, list[Call]] = {}
        self.compilations = 0

    @property
    def eager_codes(self) -> tuple[str, ...]:
        """The codes that are run as they are, each with the reason."""
        return tuple(self._refused.values())

    @property
    def compiled_codes(self) -> int:
        """How many codes run as Inductor compiled them."""
        return len(self._made.keys() - self._refused.keys())

    def calls(self, assembled: Assembled, names: Sequence[str]) -> list[Call]:
        """What to call for the codes of a program, whose segments have these names."""
        if assembled not in self._calls:
            for number, freed in _frees(assembled):
                instruction = assembled.program.instructions[number]
                code = assembled.codes[instruction.code]
                if code in self._refused or (code, freed) in self._certified:
                    continue
                try:
                    self._certify(code, freed)
                except Refusal as error:
                    self._refused[code] = f"{instruction.op.name.lower()} of {names[instruction.segment]}: {error}"
                    logger.info("not compiled by Inductor: %s", self._refused[code])
            self._calls[assembled] = [self._call(code) for code in assembled.codes]
        return self._calls[assembled]

    def _call(self, code: Code) -> Call:
        return self._made[code] if code in self._made and code not in self._refused else code.call

    def _certify(self, code: Code, freed: frozenset[int]) -> None:
        if code not in self._made:
            self._made[code] = self._compile(code)
            _compare(code, self._made[code])
        planned = code.footprint.transient_nbytes(freed, self._temporary)
        needed = _measure(code, self._made[code], freed, self._device)
        if needed > planned:
            raise Refusal(f"Inductor's needs {format_nbytes(needed)} above its inputs, where the plan counts {format_nbytes(planned)}")
        self._certified.add((code, freed))

    def _compile(self, code: Code) -> Call:
        if _draws(code, self._device):
            raise Refusal("it draws random numbers, which Inductor would draw in another order")
        self.compilations += 1
        try:
            return _lower(code)
        except Exception as error:  # whatever goes wrong in the compiler, the code itself is there and right
            lines = str(error).strip().splitlines()
            raise Refusal(f"Inductor fails: {type(error).__name__}: {lines[0] if lines else ''}") from error


def _frees(assembled: Assembled) -> list[tuple[int, frozenset[int]]]:
    """Every call of a program, with the groups of its arguments whose last reference it holds."""
    program: Program = assembled.program
    alive: dict[int, set[int]] = defaultdict(set)
    found = []
    for number, instruction in enumerate(program.instructions):
        if instruction.op in (Op.FORWARD, Op.BACKWARD):
            groups = set()
            for value, group in zip(instruction.reads, assembled.codes[instruction.code].footprint.inputs, strict=True):
                storage = program.storage_of[value]
                if storage >= 0 and alive[storage] <= set(instruction.frees):
                    groups.add(group)
            found.append((number, frozenset(groups)))
        for value in instruction.writes:
            alive[program.storage_of[value]].add(value)
        for value in instruction.frees:
            alive[program.storage_of[value]].discard(value)
    return found


def _lower(code: Code) -> Call:
    """The code by Inductor. Starts are unbacked symbols within the range of their slices, so that no value of theirs is assumed."""
    # Private (2.13.0): Inductor on a graph of ATen calls. `torch.compile` and `standalone_compile` go through AOTAutograd, whose wrappers
    # keep the arguments alive to the end of the call. Imported here: it takes a second, and few need it.
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    graph, shapes = code.graph, ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)  # constants of the graph are real
    arguments: list[Any] = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            with mode:
                arguments.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device))
        else:
            with shapes.ignore_fresh_unbacked_symbols():
                start = shapes.create_unbacked_symint()
            torch._check(start >= 0)  # type: ignore[no-untyped-call]
            if (most := _most(node)) is not None:
                torch._check(start <= most)  # type: ignore[no-untyped-call]
            arguments.append(start)

    def run(*values: Any) -> list[torch.Tensor]:
        return list(code.call(list(values)))

    # tiles add up in place; it is left out elsewhere because it makes views anew
    plain = functionalize(run, remove="mutations") if any(map(_mutates, graph.nodes)) else run
    with torch.no_grad(), tracing(TracingContext(mode)), V.set_fake_mode(mode):
        traced = make_fx(plain, decomposition_table=select_decomp_table())(*arguments)
        results = traced.graph.output_node()
        expected = [node.meta["val"].stride() for node in code.graph.output_node().args[0]]  # type: ignore[union-attr]
        results.meta["user_visible_output_idxs"] = list(range(len(expected)))  # their strides are kept
        results.meta["original_output_strides"] = expected
        made: Any = compile_fx_inner(traced, arguments, is_inference=True, layout_opt=False)
    call: Call = made.__call__
    return call


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _most(start: fx.Node) -> int | None:
    """The largest value that a start may have: where its slices are cut from ends there."""
    ends = []
    for user in start.users:
        if user.target is torch.ops.aten.narrow.default:
            source, dim, _, length = user.args
            ends.append(source.meta["val"].shape[dim] - length)  # type: ignore[union-attr]
    return min(ends, default=None)


def _make_up(code: Code, *, last: bool = True) -> list[Any]:
    """Arguments like those of the code, for its first rows or its `last`: numbers in [-1, 1) or zero integers, in storages shared alike."""
    generator: dict[torch.device, torch.Generator] = {}
    made: dict[int, torch.Tensor] = {}
    arguments: list[Any] = []
    for node in code.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            arguments.append((_most(node) or 0) if last else 0)
            continue
        storage = value.untyped_storage()
        if storage._cdata not in made:
            base = torch.empty(storage.nbytes() // value.element_size(), dtype=value.dtype, device=value.device)
            if value.is_floating_point():
                source = generator.setdefault(base.device, torch.Generator(base.device).manual_seed(0))
                base.uniform_(-1, 1, generator=source)
            else:
                base.zero_()
            made[storage._cdata] = base
        like = torch.empty(0, dtype=value.dtype, device=value.device)
        arguments.append(like.set_(made[storage._cdata].untyped_storage(), value.storage_offset(), value.shape, value.stride()))
    return arguments


def _draws(code: Code, device: torch.device) -> bool:
    """Whether a call draws random numbers; those that come after it are as if it had not."""
    on_device: Any = torch if device.type == "cpu" else torch.get_device_module(device.type)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type), torch.no_grad():
        before = on_device.get_rng_state()
        code.call(_make_up(code))
        return not torch.equal(before, on_device.get_rng_state())


def _measure(code: Code, call: Call, freed: frozenset[int], device: torch.device) -> int:
    """Bytes of a call above its inputs, of which it holds the last references to the groups `freed`."""
    with PeakMeter(device) as meter:  # inputs are made inside: on a CPU it does not see the end of what is older
        arguments = _make_up(code)
        inputs_nbytes = sum(storages(arguments).values())
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        kept = [tensor for tensor, group in zip(tensors, code.footprint.inputs, strict=True) if group not in freed]
        del tensors
        results = call(arguments)
    del results, kept
    return meter.peak_nbytes - inputs_nbytes


def _compare(code: Code, call: Call) -> None:
    """Raise `Refusal` unless `call` gives what the code gives, where the code gives it, for its first rows and for its last."""
    for last in (False, True):
        inputs = _make_up(code, last=last)
        before = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in inputs]
        with torch.no_grad():
            expected, got = code.call(list(inputs)), call(list(inputs))
        if _places(inputs, got) != _places(inputs, expected):
            raise Refusal("Inductor's results lie elsewhere, or in other strides")
        more = [new - old for new, old in zip(_made(inputs, got), _made(inputs, expected), strict=True)]
        if max(more, default=0) > 0:
            raise Refusal(f"Inductor's results keep {format_nbytes(max(more))} more")
        for old, new in zip(before, inputs, strict=True):
            if isinstance(old, torch.Tensor) and not torch.equal(old, new):
                raise Refusal("Inductor's changes its inputs")
        for want, have in zip(expected, got, strict=True):
            if not _close(have, want):
                raise Refusal(f"a result of shape {tuple(want.shape)} is another with Inductor's")


def _places(inputs: Sequence[Any], results: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    """Shape, dtype, strides and offset of every result, and which storage it is in, numbered by first appearance, inputs first."""
    number: dict[int, int] = {}
    for value in (*inputs, *results):
        if isinstance(value, torch.Tensor):
            number.setdefault(value.untyped_storage()._cdata, len(number))
    return [(t.shape, t.dtype, t.stride(), t.storage_offset(), number[t.untyped_storage()._cdata]) for t in results]


def _made(inputs: Sequence[Any], results: Sequence[torch.Tensor]) -> list[int]:
    """Bytes of the storages that results are in and no inputs, in order."""
    old = {storage for value in inputs for storage in storages(value)}
    return [nbytes for storage, nbytes in {k: v for result in results for k, v in storages(result).items()}.items() if storage not in old]


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    want, have = expected[finite].double(), got[finite].double()
    return bool((have - want).norm() <= _TOLERANCE.get(expected.dtype, 5e-2) * want.norm() + 1e-12)
