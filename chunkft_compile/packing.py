"""Several examples in one sequence, without one attending to another.

`position_ids` that begin anew say where an example begins: transformers makes a block mask of them. A model that does not is refused.
"""

import bisect
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from chunkft_compile.sequences import IGNORED, Row, Sequences

_TOKENS = 8  # of each of two examples in the trial of a model
_TOLERANCE = 1e-4  # of the largest logit: an example that is seen changes more, rounding in a mixture of experts less


def pack(rows: Sequence[Row], length: int, filler: int) -> Sequences:
    """As few sequences as best fit finds, the longest rows first; each row is whole. What is left of a sequence is an example of filler."""
    bins = _bins([len(row) for row in rows], length)
    ids = torch.full((len(bins), length), filler)
    labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for number, members in enumerate(bins):
        start = 0
        for member in members:
            row, place = rows[member], slice(start, start + len(rows[member]))
            ids[number, place], labels[number, place] = row.input_ids, row.labels
            labels[number, start] = IGNORED  # the example before does not predict it
            positions[number, place] = torch.arange(len(row))
            start = place.stop
        positions[number, start:] = torch.arange(length - start)
    return Sequences(ids, labels, positions)


def _bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the rows in each sequence: the longest first, each where it leaves the least room."""
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room, number of the bin), sorted
    for row in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect.bisect_left(left, (lengths[row], 0))
        if place == len(left):
            bins.append([])
            place, left = 0, [(room, len(bins) - 1), *left]
        free, number = left.pop(place)
        bins[number].append(row)
        bisect.insort(left, (free - lengths[row], number))
    return bins


@torch.no_grad()
def check_packing(model: Any, name: str) -> None:
    """Raise `ValueError` unless packed examples of `model` are apart, found by trying: another first one must not change the second."""
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken:
        raise ValueError(f"--packing: {name} takes no position_ids, so packed examples could not be kept apart; leave --packing out")
    first, second = (torch.arange(_TOKENS, device=model.device) + start for start in (1, _TOKENS + 1))
    positions = torch.arange(_TOKENS, device=model.device).repeat(2)[None]
    # transformers makes no mask where there is a cache; training has none of those that can be turned off
    more = {"use_cache": False} if "use_cache" in taken else {}
    was_training = model.training
    model.eval()
    one, other = (
        model(input_ids=torch.cat([ids, second])[None], position_ids=positions, **more).logits[0, _TOKENS:].float()
        for ids in (first, first.flip(0))
    )
    model.train(was_training)
    if not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * float(one.abs().max())):
        raise ValueError(f"--packing: {name} lets packed examples see each other (it makes no mask of position_ids); leave --packing out")
