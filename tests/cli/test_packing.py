"""`packing`: every example is whole, in one sequence, and has the loss that it has alone."""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from benchmarks.zoo import ZOO, Entry
from chunkft_compile.packing import check_packing, pack
from chunkft_compile.sequences import IGNORED, Row, Sequences, pad
from tests.invariants.harness import compile_quickly
from tests.models import VOCABULARY, compute_loss, llama

FILLER = 7


def rows_of(lengths: list[int]) -> list[Row]:
    """Of which the first half is only read."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        rows.append(Row(ids, ids.masked_fill(torch.arange(length) < length // 2, IGNORED)))
    return rows


def unpacked(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each example in packed sequences, without filler."""
    assert sequences.position_ids is not None
    found: list[tuple[list[int], list[int]]] = []
    for ids, labels, positions in zip(sequences.input_ids, sequences.labels, sequences.position_ids, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):
            found.append((ids[start:stop].tolist(), labels[start:stop].tolist()))
    return [one for one in found if any(label != IGNORED for label in one[1])]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(2, 12), min_size=1, max_size=30))
def test_every_example_is_in_one_sequence_whole(lengths: list[int]) -> None:
    rows = rows_of(lengths)
    packed = pack(rows, 12, FILLER)
    assert packed.input_ids.shape[1] == 12
    first = [[IGNORED, *row.labels[1:].tolist()] for row in rows]
    assert sorted(unpacked(packed)) == sorted(zip([row.input_ids.tolist() for row in rows], first, strict=True))
    used = sum(lengths)
    assert int((packed.input_ids != FILLER).sum()) <= used
    assert len(packed) >= -(-used // 12)
    # best fit leaves at most one sequence no more than half full
    filled = [int(sum(len(ids) for ids, _ in unpacked(part(packed, number)))) for number in range(len(packed))]
    assert sum(2 * one <= 12 for one in filled) <= 1


def part(sequences: Sequences, number: int) -> Sequences:
    return Sequences(**sequences.take(slice(number, number + 1)))


def losses(logits: torch.Tensor, sequences: Sequences) -> dict[tuple[int, ...], float]:
    """The summed loss of each example, by its tokens."""
    positions = sequences.position_ids if sequences.position_ids is not None else torch.arange(logits.shape[1]).expand(len(sequences), -1)
    each = cross_entropy(logits[:, :-1].flatten(0, 1), sequences.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    found: dict[tuple[int, ...], float] = {}
    for ids, labels, begins, values in zip(sequences.input_ids, sequences.labels, positions, each.view(len(sequences), -1), strict=True):
        starts = [*torch.nonzero(begins == 0).flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):
            learned = torch.nonzero(labels[start:stop] != IGNORED).flatten()
            if len(learned):
                tokens = tuple(ids[start : start + int(learned[-1]) + 1].tolist())
                found[tokens] = float(values[max(start - 1, 0) : stop - 1].sum())
    return found


@pytest.mark.usefixtures("captures_once", "allocator")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_losses_are_equal_for_each_example_and_in_training(attention: str) -> None:
    rows = rows_of([5, 9, 3, 12, 16, 4, 2, 7, 6])
    padded, packed = pad(rows, 16, FILLER), pack(rows, 16, FILLER)
    assert len(packed) < len(padded) == 9
    torch.manual_seed(0)
    model = llama(attn_implementation=attention)
    with torch.no_grad():
        alone = losses(model(input_ids=padded.input_ids).logits, padded)
        together = losses(model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits, packed)
    assert alone.keys() == together.keys()
    assert len(alone) == len(rows)
    assert [together[key] for key in alone] == pytest.approx(list(alone.values()), rel=1e-5)
    count = sum(int((row.labels[1:] != IGNORED).sum()) for row in rows)
    compiled = compile_quickly(model.train(), 10**7)
    loss = compute_loss(compiled, packed.take(slice(None)))
    assert loss.item() == pytest.approx(sum(alone.values()) / count, rel=1e-5)
    torch.autograd.backward(loss)


# the others take no position_ids, make no mask of them, or carry a state from token to token
APART = {"Llama", "Mistral", "Qwen3", "Gemma-2", "Phi-3", "GPT-2", "GPT-NeoX", "Falcon", "Mixtral", "Qwen3-MoE", "DeepSeek-V3"}
MIXED = {"OPT", "BLOOM", "GPT-OSS", "Mamba", "RecurrentGemma"}


def difference(model: Any) -> float:
    """Between the logits of an example behind another one and alone, part of the largest."""
    first, second = torch.arange(8)[None], torch.arange(8)[None] + 8
    with torch.no_grad():
        alone = model(input_ids=second, use_cache=False).logits
        behind = model(input_ids=torch.cat([first, second], 1), position_ids=torch.arange(8).repeat(2)[None], use_cache=False).logits[:, 8:]
    return float((alone - behind).abs().max() / alone.abs().max())


@pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.name in APART | MIXED], ids=lambda entry: entry.name)
def test_models_that_mix_packed_examples_are_refused_and_no_others(entry: Entry) -> None:
    torch.manual_seed(0)
    model: Any = entry.build().eval()
    apart = difference(model) < 1e-5
    assert apart == (entry.name in APART)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).train()
        with nullcontext() if apart else pytest.raises(ValueError, match=r"--packing: m (takes no position_ids|lets packed examples see)"):
            check_packing(model, "m")
            assert model.training
