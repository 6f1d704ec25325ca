"""Trainings that are killed: a process that has everything imported and captured forks children that train, and kills them.

`python -m tests.support.killing random|writes DIRECTORY COUNT SEED` prints one line of JSON: what happened, and a digest of all
weights, state, generators and positions at the end of every run.
"""

import argparse
import functools
import gc
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from chunkft_compile import latest_checkpoint, load_checkpoint, save_checkpoint
from chunkft_compile.planner import Update
from chunkft_compile.runtime import archive
from chunkft_compile.runtime.archive import Archive
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Case, compute_loss, gpt2, token_batch

CASE = Case("gpt2-dropout", functools.partial(gpt2, dropout=0.3), token_batch)
SWEEP = (Update.HELD,) * 3
MICRO = 2
CALLS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "rename"),
    (shutil, "rmtree"),
    (archive, "save_file"),
    (archive, "_sha256"),
)
EVENTS = 4 * len(SWEEP) * (MICRO + 1)  # four sweeps


class Training:
    """One run in one process: an event is a backward or an optimizer step, and a checkpoint follows each."""

    def __init__(self) -> None:
        self.model = compile_quickly(CASE.build(), 10**8, accumulation=True)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (step + 1))

    def start(self, directory: Path) -> None:
        """The checkpoint that every run starts from."""
        torch.manual_seed(0)
        self.model.plan(**CASE.batch(0))
        self._save(directory, 0)

    def load(self, directory: Path) -> int:
        """Take up the latest checkpoint; the events that are done."""
        return int(load_checkpoint(directory, self.model, self.optimizer, scheduler=self.scheduler)["done"])

    def go_on(self, directory: Path) -> str:
        """From the latest checkpoint to the end; a digest of everything then."""
        for number in range(self.load(directory), EVENTS):
            self.advance(directory, number)
        return self._digest()

    def advance(self, directory: Path, number: int) -> None:
        """One event and its checkpoint."""
        self._event(number)
        self._save(directory, number + 1)

    def _event(self, number: int) -> None:
        step, place = divmod(number, MICRO + 1)
        if place < MICRO:
            torch.autograd.backward(compute_loss(self.model, CASE.batch(MICRO * step + place)))
            return
        if self.model.schedule is None:  # resumed right before the step
            self.model.plan(**CASE.batch(0))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def _save(self, directory: Path, done: int) -> None:
        save_checkpoint(directory, self.model, self.optimizer, scheduler=self.scheduler, extra={"done": done})

    def _digest(self) -> str:
        found = hashlib.sha256()
        states = [self.optimizer.state.get(leaf, {}) for leaf in self.model.parameters()]
        tensors = [*self.model.state_dict().values(), *(value for state in states for value in state.values()), torch.get_rng_state()]
        for tensor in tensors:
            found.update(tensor.detach().numpy().tobytes())
        standing = self.model._session.standing()
        state = standing.state
        position = (standing.steps, state.count, sorted(state.trained), sorted(state.stepped), [step.chunks for step in state.steps])
        found.update(repr((position, self.scheduler.last_epoch)).encode())
        return found.hexdigest()


@contextmanager
def _child(work: Callable[[], object]) -> Iterator[int]:
    """A forked process that does its work and leaves."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    yield pid


def _run(work: Callable[[], object]) -> int:
    """The wait status of a child."""
    with _child(work) as pid:
        return os.waitpid(pid, 0)[1]


def _finish(directory: Path) -> str:
    """Run to the end in a child of its own; the digest."""
    target = directory / "digest"
    status = _run(lambda: target.write_text(Training().go_on(directory)))
    assert status == 0, f"a run to the end failed with {status}"
    return target.read_text()


def _copies(base: Path, root: Path) -> Iterator[Path]:
    for number in itertools.count():
        yield Path(shutil.copytree(base, root / f"run-{number}"))


def kill_at_random(base: Path, root: Path, count: int, choose: random.Random) -> dict[str, Any]:
    """Kill and resume, at moments anywhere in the life of a process, until there were `count` kills."""
    kills, writes, digests = 0, 0, []
    begin = time.perf_counter()
    whole = _finish(Path(shutil.copytree(base, root / "whole")))
    most_s = time.perf_counter() - begin
    for directory in _copies(base, root):
        while kills < count and _done(directory) < EVENTS:
            before = set(os.listdir(directory))
            with _child(functools.partial(_train, directory)) as pid:
                time.sleep(choose.uniform(0.0, most_s / 2))
                os.kill(pid, signal.SIGKILL)  # it waits to be collected, so the number is still its own
                kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            writes += any(name.startswith(".step-") for name in set(os.listdir(directory)) - before)
        digests.append(_finish(directory))
        if kills >= count:
            break
    return {"kills": kills, "in_writes": writes, "whole": whole, "digests": digests}


def _train(directory: Path) -> None:
    Training().go_on(directory)


def kill_in_writes(base: Path, root: Path, count: int, choose: random.Random) -> dict[str, Any]:
    """Kill a save before its first call to the system, the next one before its second, and so on until one has fewer; `count` at most."""
    whole = _finish(Path(shutil.copytree(base, root / "whole")))
    directory, kills, kept = Path(shutil.copytree(base, root / "run")), 0, 0
    for call in range(count):
        before = _done(directory)
        assert before < EVENTS, "the run ended before every call was tried"
        killed = os.WIFSIGNALED(_run(functools.partial(_die_in_save, directory, call)))
        latest = latest_checkpoint(directory)
        assert latest is not None
        with Archive(latest):  # every byte of it is right
            after = _done(directory)
        assert after in (before, before + 1), f"{before} events were done, and the latest checkpoint has {after}"
        if not killed:
            break
        kills, kept = kills + 1, kept + after - before
    digest = _finish(directory)
    left = len(os.listdir(directory)) - 1  # without the digest
    return {"kills": kills, "kept": kept, "all_calls": not killed, "left": left, "whole": whole, "digests": [digest]}


def _die_in_save(directory: Path, call: int) -> None:
    """One event and a save that is killed before its `call`-th call."""
    training, left = Training(), itertools.count(call, -1)
    number = training.load(directory)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return called

    for module, name in CALLS:
        setattr(module, name, deadly(getattr(module, name)))
    training.advance(directory, number)


def _done(directory: Path) -> int:
    latest = latest_checkpoint(directory)
    assert latest is not None, f"there is no checkpoint in {directory}"
    return int(torch.load(latest / "training.pt", weights_only=True)["extra"]["done"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare what children share, and run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("random", "writes"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    Workshop().open(patch)
    plan_by_hand(patch, SWEEP, scattered=True)
    Training().start(args.directory / "base")
    gc.collect()
    gc.freeze()  # children collect many times, and would visit and copy all of this process each time
    run = kill_at_random if args.how == "random" else kill_in_writes
    print(json.dumps(run(args.directory / "base", args.directory, args.count, random.Random(args.seed))))


if __name__ == "__main__":
    main()
