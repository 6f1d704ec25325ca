"""Train every model of the zoo in chunks, hold it against autograd, and write the table of docs/models.md.

    python -m benchmarks.zoo
    python -m benchmarks.zoo --only Llama Mamba-2
    python -m benchmarks.zoo --write docs/models.md

Every model gets a budget 5 % above the smallest one that works. In a first sweep the learning rate is 0, so that every step's gradients
can be compared with those that autograd gives for the same weights, batch and dropout masks; a second sweep trains, and its bytes
are measured. Exits with 1 where a model neither works nor is refused with a reason.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.common import circumstances
from benchmarks.zoo import ZOO
from benchmarks.zoo.entries import HIDDEN, LAYERS
from benchmarks.zoo.trial import LEEWAY, TOLERANCE, Outcome, attempt
from chunkft_compile.runtime.allocators import Allocator, install
from chunkft_compile.runtime.native import BuildError

HEADERS = (
    "model",
    "what is particular",
    "outcome",
    "parameters",
    "segments",
    "kinds",
    "chunks",
    "steps",
    "largest difference",
    "bytes of prediction",
)


def row(outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    if outcome.refused:
        return (outcome.name, outcome.what, f"refused: {' '.join(outcome.refused.split())}", *[""] * (len(HEADERS) - 3))
    said = "works" if outcome.works else "FAILS"
    if outcome.dense:
        said += f", {len(outcome.dense)} dense: {', '.join(outcome.dense[:2])}" + (", ..." if len(outcome.dense) > 2 else "")
    counts = (outcome.parameters, outcome.segments, outcome.kinds, outcome.chunks, outcome.steps)
    share = f"{outcome.measured_nbytes / outcome.predicted_nbytes:.3f}" if outcome.measured_nbytes else "not measured"
    return (outcome.name, outcome.what, said, *map(str, counts), f"{outcome.difference:.0e}", share)


def document(outcomes: Sequence[Outcome]) -> str:
    """The text of docs/models.md."""
    working = sum(outcome.works for outcome in outcomes)
    return f"""# Models

{working} of {len(outcomes)} architectures train in chunks with the gradients of plain autograd. Each is tried as a tiny model
(about {LAYERS} blocks of width {HIDDEN}, random weights) in a budget {LEEWAY - 1:.0%} above the smallest one that works.

- *works*: in one sweep every element of every parameter is trained exactly once, no gradient differs from autograd's by more than
  {TOLERANCE:g} of the largest element of that parameter's gradient, and no step needed more bytes than predicted.
- *dense*: no slicing rule is known for the gradient of these parameters. It is computed whole and cut, which is right and counted in the
  plan, but costs the bytes of the whole gradient while it is made.
- *refused*: `compile` says why, and changes nothing.
- *segments* and *kinds*: parts of the graph, and how many of them differ. *bytes of prediction*: measured peak / predicted peak.

`chunkft doctor MODEL` says the same of a model of yours. This page is written by `python -m benchmarks.zoo --write docs/models.md`.

{tabulate([row(outcome) for outcome in outcomes], HEADERS, tablefmt="github", disable_numparse=True)}

{circumstances("CPU only")}
"""


def main() -> None:
    """Try them and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[entry.name for entry in ZOO], help="some of them")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, not only the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="transformers")
    outcomes = []
    for entry in ZOO:
        if not options.only or entry.name in options.only:
            outcomes.append(attempt(entry, _hook()))
            print(f"{entry.name}: {row(outcomes[-1])[2]}", file=sys.stderr, flush=True)
    print(tabulate([row(outcome) for outcome in outcomes], HEADERS, disable_numparse=True, maxcolwidths=[None, 30, 60]))
    if options.write:
        options.write.write_text(document(outcomes), encoding="utf-8")
    sys.exit(not all(outcome.works or outcome.refused for outcome in outcomes))


def _hook() -> Allocator | None:
    try:
        return install()
    except BuildError as error:
        print(f"bytes are not measured: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    main()
