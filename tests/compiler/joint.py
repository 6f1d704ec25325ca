"""Captured and lowered small models, made once per test process."""

import functools

from chunkft_compile.assembly import Rows, propagate
from chunkft_compile.capture import Capture, capture
from chunkft_compile.codes import Demand
from chunkft_compile.lowering import Lowering
from chunkft_compile.segments import Segment, cut
from tests import models


@functools.cache
def captured(name: str) -> Capture:
    """The joint graph of a case of `tests.models`."""
    case = next(case for case in models.CASES if case.name == name)
    args, kwargs = case.arguments()
    return capture(case.build(), args, kwargs)


@functools.cache
def lowered(name: str) -> Lowering:
    """A lowering of that graph; its codes are shared between tests."""
    found = captured(name)
    return Lowering(found, cut(found))


def whole_rows(lowering: Lowering) -> dict[int, Rows]:
    """Every trained parameter as one chunk."""
    sizes = {name: (node.meta["val"].shape or (1,))[0] for name, node in lowering.capture.gradients.items()}
    return {number: Rows(name, 0, size, size) for number, (name, size) in enumerate(sizes.items())}


def halves(lowering: Lowering) -> dict[int, Rows]:
    """Every trained parameter as two chunks, where it has two rows."""
    found = []
    for rows in whole_rows(lowering).values():
        middle = rows.size // 2
        found += [Rows(rows.param, start, stop, rows.size) for start, stop in ((0, middle), (middle, rows.size)) if start < stop]
    return dict(enumerate(found))


def demands(lowering: Lowering, segment: Segment, *, sliced: bool = True) -> list[Demand]:
    """Everything a segment can be asked for when all parameters are trained, in the order of lowering."""
    rows = halves(lowering) if sliced else whole_rows(lowering)
    found = propagate(lowering, rows, ["save"] * len(lowering.segments))
    code, _, _ = found.codes[segment.number]
    return list(code.demands)
