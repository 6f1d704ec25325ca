"""Passes over the joint graph, before it is cut into segments: what torch wrote is put into a form that can be sliced and counted.

`PASSES` is the list, in order. A pass changes the graph in place, keeps what it computes, and gives every node that it makes the
metadata of the one it replaces, with a fake value of its own. `CHUNKFT_SKIP_PASSES=name,name` leaves some out, to find out
which one is to blame; each pass says at level DEBUG how long it took and which operators became more or fewer.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.passes.copies import write_copies_anew
from chunkft_compile.passes.functions import tag_functions
from chunkft_compile.passes.losses import reduce_losses
from chunkft_compile.passes.mixed_norms import correct_statistics
from chunkft_compile.passes.splitting import split_experts, sum_biases

__all__ = ["PASSES", "Pass", "Ran", "run_passes"]

logger = logging.getLogger(__name__)

SKIP = "CHUNKFT_SKIP_PASSES"


@dataclass(frozen=True)
class Pass:
    """A pass and its name."""

    name: str
    run: Callable[[fx.Graph, FakeTensorMode], None]


@dataclass(frozen=True)
class Ran:
    """One pass that was run: its seconds, and how many more calls of each operator there are since."""

    name: str
    seconds: float
    changes: dict[str, int]

    def __str__(self) -> str:
        told = ", ".join(f"{target} {count:+d}" for target, count in sorted(self.changes.items())) or "nothing"
        return f"pass {self.name}: {told}, {self.seconds * 1e3:.1f} ms"


PASSES = (
    Pass("functions", tag_functions),
    Pass("statistics", correct_statistics),
    Pass("biases", sum_biases),
    Pass("experts", split_experts),
    Pass("copies", write_copies_anew),
    Pass("losses", reduce_losses),
)


def run_passes(graph: fx.Graph, fake_mode: FakeTensorMode, passes: Iterable[Pass] = PASSES) -> tuple[Ran, ...]:
    """Run the passes that are not switched off. Raises `ValueError` for a name in CHUNKFT_SKIP_PASSES that no pass has."""
    passes = tuple(passes)
    skipped = {name.strip() for name in os.environ.get(SKIP, "").split(",")} - {""}
    if strange := skipped - {each.name for each in passes}:
        raise ValueError(f"{SKIP} names {min(strange)!r}, which is no pass; there are {', '.join(each.name for each in passes)}")
    ran = []
    for each in passes:
        if each.name in skipped:
            logger.warning("pass %s is left out, as %s says", each.name, SKIP)
            continue
        before, start = _operators(graph), time.perf_counter()
        each.run(graph, fake_mode)
        graph.lint()
        after = _operators(graph)
        changes = {target: after[target] - before[target] for target in before | after if after[target] != before[target]}
        ran.append(Ran(each.name, time.perf_counter() - start, changes))
        logger.debug("%s", ran[-1])
    return tuple(ran)


def _operators(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
