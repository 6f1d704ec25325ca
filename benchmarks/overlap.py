"""Whether copies run beside compute: every wait of the deepest step of a model whose weights and state are streamed from the disk.

    python -m benchmarks.overlap --work /scratch
    python -m benchmarks.overlap --work /scratch --update immediate --trace step.json

A Llama with random fp32 weights, all of them and all optimizer state (`AdamW(fused=True)`) in a file in `--work`. One sweep makes the
state; of the next one, each step is measured and the deepest shown, with what was read and written in each phase of it, how long computing
stood still there and what it waited for. Hidden is the share of transfer time that computing did not wait for; the time is that in which
at least one piece was on its way, in the direction that took longer. `--trace` writes the step for https://ui.perfetto.dev: calls, waits
and copies as they happened. Exits with 1 if a step takes more bytes than predicted, or less than `--least` is hidden.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_compile
from benchmarks.common import UPDATES, Batch, circumstances, run_alone, train_step
from chunkft_compile.budget import parse_budget
from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Placement
from chunkft_compile.planner.program import Instruction, Op, Program
from chunkft_compile.runtime.allocators import install
from chunkft_compile.runtime.file_store import FileStore
from chunkft_compile.runtime.guard import Watch
from chunkft_compile.runtime.store import Traffic
from chunkft_compile.runtime.transfers import Direction, _Meter

VOCABULARY, HEADS = 8000, 8
PHASES = ("forward", "backward", "optimizer.step()")


class Moment(NamedTuple):
    """An instruction as it ran; `waited_ns` of it were spent on copies. `phase` indexes `PHASES`."""

    phase: int
    instruction: Instruction
    start_ns: int
    stop_ns: int
    waited_ns: int
    traffic: Traffic


class Piece(NamedTuple):
    """A piece of a copy on its way."""

    direction: Direction
    start_ns: int
    stop_ns: int


@dataclass
class Tape:
    """What happened in one step."""

    program: Program | None = None
    moments: list[Moment] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    start_ns: int = 0
    stop_ns: int = 0
    moved: Traffic = field(default_factory=Traffic)
    predicted_nbytes: int = 0
    measured_nbytes: int = 0

    def deepest(self) -> int:
        """The lowest segment with a backward."""
        assert self.program is not None, "a step that ran has a program"
        return min(step.segment for step in self.program.instructions if step.op is Op.BACKWARD)


class Recorder:
    """Listens to a model and its store."""

    def __init__(self, model: ChunkedModule) -> None:
        store = model._session.stores[Placement.DISK]
        assert isinstance(store, FileStore), "the disk's store is a file"
        self.store, self.tape = store, Tape()
        meters = store._transfers.meters
        for direction in Direction:
            meters[direction] = _Listening(direction, self)
        session: Any = model._session
        inner = session.watch

        def watch(*args: Any, **kwargs: Any) -> Watch:
            compiled, step = args
            session._watch = noting = _Noting(inner(*args, **kwargs), session.program(compiled, step).program, self)
            return noting

        session.watch = watch

    def record(self, model: ChunkedModule, optimizer: Optimizer, batch: Batch) -> Tape:
        """Train one step."""
        before = model.traffic
        self.tape = tape = Tape(predicted_nbytes=model.progress.predicted_nbytes, start_ns=time.perf_counter_ns())
        train_step(model, optimizer, batch)
        tape.stop_ns, tape.moved = time.perf_counter_ns(), model.traffic - before
        return tape


class _Listening(_Meter):
    """A meter that also keeps when each piece was on its way."""

    def __init__(self, direction: Direction, recorder: Recorder) -> None:
        super().__init__()
        self._direction, self._recorder = direction, recorder

    @contextlib.contextmanager
    def moving(self, nbytes: int) -> Iterator[None]:
        """See `_Meter.moving`."""
        start = time.perf_counter_ns()
        with super().moving(nbytes):
            yield
        self._recorder.tape.pieces.append(Piece(self._direction, start, time.perf_counter_ns()))


class _Noting(Watch):
    """Notes every instruction and passes on what it is told."""

    def __init__(self, inner: Watch, program: Program, recorder: Recorder) -> None:
        self._inner, self._recorder = inner, recorder
        self._instructions: Sequence[Instruction] = program.instructions
        self._middle, self._phase, self._first = program.backward_starts, 0, 0
        recorder.tape.program = program

    def _mark(self) -> None:
        self._since, self._waited, self._moved = time.perf_counter_ns(), self._recorder.store.waited_ns, self._recorder.store.traffic

    def anchor(self, number: int, spare_nbytes: int = 0) -> None:
        """See `Watch.anchor`."""
        self._inner.anchor(number, spare_nbytes)
        self._phase = int(number == self._middle)
        self._mark()

    def begin_update(self, instructions: Sequence[Instruction]) -> None:
        """See `Watch.begin_update`."""
        self._inner.begin_update(instructions)
        self._phase, self._instructions, self._first = 2, instructions, self._inner.number_of(0)
        self._mark()

    def look(self, number: int) -> None:
        """See `Watch.look`."""
        now, waited, moved = time.perf_counter_ns(), self._recorder.store.waited_ns, self._recorder.store.traffic
        self._inner.look(number)
        step = self._instructions[number - self._first]
        self._recorder.tape.moments.append(Moment(self._phase, step, self._since, now, waited - self._waited, moved - self._moved))
        self._mark()

    def settle(self) -> None:
        """See `Watch.settle`."""
        self._inner.settle()

    def number_of(self, place: int) -> int:
        """See `Watch.number_of`."""
        return self._inner.number_of(place)


def build_model(layers: int, hidden: int) -> torch.nn.Module:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model: torch.nn.Module = LlamaForCausalLM(config).train()
    return model


def measure(layers: int, hidden: int, tokens: int, budget_nbytes: int, update: str, work: Path) -> list[Tape]:
    """The steps of the second sweep."""
    hook = install()
    settings: dict[str, Any] = {"store": work, "weights": ["disk"], "state": ["disk"], "update": update}
    model = chunkft_compile.compile(build_model(layers, hidden), budget_nbytes, **settings)
    optimizer = AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(VOCABULARY, (1, tokens))
    batch = {"input_ids": ids, "labels": ids}
    steps = len(model.plan(**batch).steps)
    for _ in range(steps):
        train_step(model, optimizer, batch)
    recorder, tapes = Recorder(model), []
    for _ in range(steps):
        hook.reset()
        tapes.append(recorder.record(model, optimizer, batch))
        tapes[-1].measured_nbytes = hook.peak()
    return tapes


def why(step: Instruction) -> str:
    """What an instruction waits for."""
    match step.op:
        case Op.FORWARD | Op.BACKWARD:
            return f"weights or saved values that a {step.op} reads"
        case Op.UPDATE:
            return "state that an update needs"
        case _ if step.chunks:
            return f"state on its way out, before its bytes are given to others ({step.op})"
        case _ if step.weights:
            return f"weights that were changed, on their way out ({step.op})"
        case _:
            return f"saved values on their way out ({step.op})"


def summary(tape: Tape) -> str:
    """The step in two tables: its phases, and its waits by cause."""
    rows: list[tuple[object, ...]] = []
    causes: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for number, phase in enumerate(PHASES):
        inside = [moment for moment in tape.moments if moment.phase == number]
        moved = sum((moment.traffic for moment in inside), Traffic())
        seconds, waited = (sum(values) / 1e9 for values in ([m.stop_ns - m.start_ns for m in inside], [m.waited_ns for m in inside]))
        rows.append(
            (phase, seconds, moved.read_nbytes / 1e6, moved.written_nbytes / 1e6, moved.reading_us / 1e6, moved.writing_us / 1e6, waited)
        )
    for moment in tape.moments:
        if moment.waited_ns:
            cause = f"{PHASES[moment.phase]}: {why(moment.instruction)}"
            causes[cause] = causes[cause][0] + moment.waited_ns, causes[cause][1] + 1
    total = tape.moved
    whole = (tape.stop_ns - tape.start_ns) / 1e9, total.read_nbytes / 1e6, total.written_nbytes / 1e6
    rows.append(("the step", *whole, total.reading_us / 1e6, total.writing_us / 1e6, total.waiting_us / 1e6))
    table = tabulate(rows, ("", "s", "read MB", "written MB", "reading s", "writing s", "waited s"), floatfmt=".2f")
    waits = [(cause, ns / 1e9, times) for cause, (ns, times) in sorted(causes.items(), key=lambda item: -item[1][0])]
    return f"{table}\n\n{tabulate(waits, ('computing waited for', 's', 'times'), floatfmt='.3f')}"


def trace(tape: Tape) -> str:
    """The step in the Trace Event Format: one row of calls and waits, one for copies each way."""
    rows = ("calls", "waits", *(f"copies: {direction.value}" for direction in Direction))
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": row}} for number, row in enumerate(rows, 1)
    ]

    def add(row: str, name: str, start_ns: int, stop_ns: int) -> None:
        start, length = (start_ns - tape.start_ns) / 1000, (stop_ns - start_ns) / 1000
        events.append({"ph": "X", "name": name, "pid": 1, "tid": rows.index(row) + 1, "ts": start, "dur": length})

    for moment in tape.moments:
        step = moment.instruction
        name = f"{step.op} of segment {step.segment}" if step.segment >= 0 else f"{step.op} of {len(step.chunks)} chunks"
        add("calls", name, moment.start_ns + moment.waited_ns, moment.stop_ns)  # a call waits before it computes
        if moment.waited_ns:
            add("waits", f"{name}: {why(step)}", moment.start_ns, moment.start_ns + moment.waited_ns)
    for direction in Direction:
        for start, stop in _busy(piece for piece in tape.pieces if piece.direction is direction):
            add(f"copies: {direction.value}", direction.value, start, stop)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _busy(pieces: Iterator[Piece]) -> list[tuple[int, int]]:
    """Spans in which at least one of the pieces was on its way."""
    spans: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: piece.start_ns):
        if spans and piece.start_ns <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], piece.stop_ns)
        else:
            spans.append((piece.start_ns, piece.stop_ns))
    return spans


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory on a real disk")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="its width (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the one sequence (default: %(default)s)")
    parser.add_argument("--budget", default="450MB", help="budget of the compiled model (default: %(default)s)")
    parser.add_argument("--update", choices=UPDATES, default="held", help="when gradients are applied (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="file for the trace of the deepest step")
    parser.add_argument("--least", type=float, default=0.0, help="share of transfer time to be hidden (default: %(default)s)")
    options = parser.parse_args()
    budget_nbytes = parse_budget(options.budget, torch.device("cpu"))
    tapes = run_alone(measure, options.layers, options.hidden, options.tokens, budget_nbytes, options.update, options.work)
    deepest = min(tapes, key=Tape.deepest)
    print(summary(deepest))
    print()
    rows = [
        (number, tape.deepest(), tape.predicted_nbytes / 1e6, tape.measured_nbytes / 1e6, tape.moved.hidden)
        for number, tape in enumerate(tapes, 1)
    ]
    print(tabulate(rows, ("step", "depth", "predicted MB", "measured MB", "hidden"), floatfmt=("", "", ".1f", ".1f", ".3f")))
    if options.trace:
        options.trace.write_text(trace(deepest), encoding="utf-8")
    shape = f"Llama {options.layers} x {options.hidden}, vocabulary {VOCABULARY}, fp32, 1 x {options.tokens}"
    print(circumstances(f"{shape}, {options.budget}, {options.update}"))
    broken = any(tape.measured_nbytes > tape.predicted_nbytes for tape in tapes)
    sys.exit(broken or deepest.moved.hidden < options.least)


if __name__ == "__main__":
    main()
