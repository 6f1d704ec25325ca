"""Rounding, masters and their stand-ins, on chunks alone."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.chunks import Chunk, split_parameters
from chunkft_compile.runtime.precision import MASTER, Precision, Rounding, gradient_dtype, piece_rows

MASTERS = Rounding(Precision.MASTER)


def _chunk(values: torch.Tensor) -> Chunk:
    (chunk,) = split_parameters(nn.ParameterList([nn.Parameter(values)]), 1 << 30, wide=True)
    return chunk


def _step(rounding: Rounding, optimizer: Optimizer, chunk: Chunk, gradient: torch.Tensor) -> None:
    chunk.leaf.grad = gradient
    rounding.step(optimizer, [chunk])
    chunk.leaf.grad = None


def _rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    rows = torch.empty(values.shape, dtype=torch.bfloat16)
    Rounding(Precision.STOCHASTIC, seed=seed).round_into(rows, values.clone())
    return rows


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 1000))
def test_a_value_rounds_to_one_of_its_neighbours(value: float, seed: int) -> None:
    bits = torch.tensor([value]).view(torch.int32)
    down = bits.bitwise_and(-0x10000)
    up = down + 0x10000
    neighbours = torch.stack([down, up]).view(torch.float32).flatten().tolist()
    (found,) = _rounded(torch.tensor([value]), seed).tolist()
    assert found in neighbours
    assert found == value or down.item() != bits.item()  # what bf16 can hold stays


@given(st.floats(0.5, 2.0**60, width=32), st.sampled_from([-1.0, 1.0]), st.floats(0, 1))
def test_rounding_is_right_on_average(scale: float, sign: float, part: float) -> None:
    low = torch.tensor(scale).bfloat16().float() * sign
    unit = (low.view(torch.int32) + 0x10000).view(torch.float32) - low
    value = low + part * unit
    count = 4096
    mean = (_rounded(value.expand(count).clone()).double().mean() - low.double()) / unit.double()
    assert abs(mean.item() - ((value.double() - low.double()) / unit.double()).item()) < 5 * 0.5 / count**0.5


def test_what_is_not_finite_stays_so() -> None:
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([nans, torch.tensor([torch.inf, -torch.inf])])
    for seed in range(100):
        found = _rounded(values, seed)
        assert found[:3].isnan().all()
        assert found[3:].tolist() == [torch.inf, -torch.inf]


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkft_compile.runtime.precision._PIECE", 12)
    assert [piece_rows(shape) for shape in [(7, 3), (7, 5, 5), (100,), ()]] == [4, 1, 12, 12]
    values = torch.randn(7, 3)
    found = _rounded(values)
    assert (found.float() - values).abs().max() <= values.abs().max() * 2**-7
    assert found.float().ne(0).all()


def test_random_bits_are_its_own() -> None:
    before = torch.get_rng_state()
    first, again, other = _rounded(torch.full((64,), 1.003)), _rounded(torch.full((64,), 1.003)), _rounded(torch.full((64,), 1.003), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_stochastic_rounding_follows_updates_that_plain_rounding_loses() -> None:
    """A thousand steps of a tenth of half a unit: plain bf16 stands still."""
    plain, chunk = torch.ones(256, dtype=torch.bfloat16), _chunk(torch.ones(256, dtype=torch.bfloat16))
    optimizer, rounding = torch.optim.SGD([chunk.leaf], lr=1.0), Rounding(Precision.STOCHASTIC)
    for _ in range(1000):
        plain.add_(torch.full_like(plain, 2.0**-12))
        _step(rounding, optimizer, chunk, torch.full((256,), -(2.0**-12), dtype=torch.bfloat16))
    assert plain.eq(1).all()
    assert chunk.rows.float().mean().item() == pytest.approx(1 + 1000 * 2.0**-12, abs=0.01)
    assert optimizer.state[chunk.leaf] == {}


@pytest.mark.parametrize("rounding", [MASTERS, Rounding(Precision.STOCHASTIC)], ids=["master", "stochastic"])
def test_between_updates_a_leaf_is_an_fp32_nan_without_bytes(rounding: Rounding) -> None:
    chunk = _chunk(torch.randn(8, 4).bfloat16())
    optimizer = torch.optim.AdamW([chunk.leaf])
    for _ in range(2):
        assert (chunk.leaf.dtype, chunk.leaf.shape) == (torch.float32, (8, 4))
        assert chunk.leaf.isnan().all()
        assert chunk.leaf.untyped_storage().nbytes() == 4
        assert chunk.nbytes == 64
        _step(rounding, optimizer, chunk, torch.ones(8, 4, dtype=torch.bfloat16))


def test_the_gradient_is_again_what_it_was() -> None:
    chunk = _chunk(torch.randn(8, 4).bfloat16())
    gradient = torch.ones(8, 4, dtype=torch.bfloat16)
    chunk.leaf.grad = gradient
    MASTERS.step(torch.optim.AdamW([chunk.leaf]), [chunk])
    assert chunk.leaf.grad is gradient


def test_weights_that_were_changed_beside_their_master_are_taken() -> None:
    chunk = _chunk(torch.ones(6, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([chunk.leaf], lr=1.0)
    small = torch.full((6,), -(2.0**-12), dtype=torch.bfloat16)
    _step(MASTERS, optimizer, chunk, small)
    chunk.weight.data[:2] = 5.0
    chunk.weight.data[2] = torch.nan
    _step(MASTERS, optimizer, chunk, small)
    master = optimizer.state[chunk.leaf][MASTER]
    assert torch.equal(master[:2], torch.full((2,), 5 + 2.0**-12))
    assert master[2].isnan()
    assert torch.equal(master[3:], torch.full((3,), 1 + 2 * 2.0**-12))
    assert torch.equal(chunk.weight[:2].float(), torch.full((2,), 5.0))


class _Failing(torch.optim.AdamW):
    """Breaks at its second step, after it has changed the parameters."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("broken")


@pytest.mark.parametrize("precision", [Precision.MASTER, Precision.STOCHASTIC])
def test_an_error_in_a_step_leaves_the_weights(precision: Precision) -> None:
    chunk, rounding = _chunk(torch.randn(8).bfloat16()), Rounding(precision)
    optimizer, gradient = _Failing([chunk.leaf], lr=0.1), torch.ones(8, dtype=torch.bfloat16)
    _step(rounding, optimizer, chunk, gradient)
    before = chunk.rows.clone()
    with pytest.raises(RuntimeError, match="broken"):
        _step(rounding, optimizer, chunk, gradient)
    assert torch.equal(chunk.rows, before)
    assert chunk.leaf.isnan().all()
    chunk.leaf.grad = None
    optimizer.state[chunk.leaf].update({key: torch.zeros(()) for key in ("step",)})
    _step(rounding, optimizer, chunk, torch.zeros(8, dtype=torch.bfloat16))
    assert (chunk.rows.float() - before.float() * (1 - 0.1 * 0.01)).abs().max() < 0.15  # from the weights, not from the broken master


Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adagrad": lambda leaves: torch.optim.Adagrad(leaves, lr=0.1),
    "adafactor": lambda leaves: torch.optim.Adafactor(leaves, lr=0.1),
    "nadam": lambda leaves: torch.optim.NAdam(leaves, lr=0.1),
    "adamw fused": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, fused=True),
    "rmsprop": lambda leaves: torch.optim.RMSprop(leaves, lr=0.1),
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.1),
    "rprop": lambda leaves: torch.optim.Rprop(leaves, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_master_is_an_fp32_parameter_whose_state_can_be_kept_and_loaded(name: str) -> None:
    start = torch.randn(6, 4).bfloat16()
    plain, chunk = nn.Parameter(start.float()), _chunk(start.clone())
    reference, optimizer = OPTIMIZERS[name]([plain]), OPTIMIZERS[name]([chunk.leaf])
    for seed in range(4):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
        plain.grad = gradient.float()
        reference.step()
        _step(MASTERS, optimizer, chunk, gradient)
        assert torch.equal(chunk.rows, plain.detach().bfloat16())
        if seed == 1:  # another process goes on
            kept = optimizer.state_dict()
            chunk = _chunk(chunk.rows.clone())
            optimizer = OPTIMIZERS[name]([chunk.leaf])
            optimizer.load_state_dict(kept)
    assert torch.equal(optimizer.state[chunk.leaf][MASTER], plain.detach())


def test_parameter_groups_can_be_added() -> None:
    first, second = _chunk(torch.ones(4, dtype=torch.bfloat16)), _chunk(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([first.leaf], lr=1.0)
    optimizer.add_param_group({"params": [second.leaf], "lr": 2.0})
    for chunk in (first, second):
        _step(MASTERS, optimizer, chunk, torch.ones(4, dtype=torch.bfloat16))
    assert (first.rows[0].item(), second.rows[0].item()) == (0.0, -1.0)


def test_narrow_gradients_can_be_clipped_unscaled_and_added_up() -> None:
    chunk = _chunk(torch.ones(4, dtype=torch.bfloat16))
    chunk.leaf.grad = torch.full((4,), 8.0, dtype=torch.bfloat16)
    chunk.leaf.grad.add_(torch.full((4,), 8.0, dtype=torch.bfloat16))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([chunk.leaf], lr=1.0)
    scaler.unscale_(optimizer)
    assert nn.utils.clip_grad_norm_([chunk.leaf], 1.0).item() == 8.0
    assert chunk.leaf.grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_fp16_weights_are_fp32_unless_plain(dtype: torch.dtype) -> None:
    assert gradient_dtype(dtype, Precision.PLAIN) == dtype
    assert gradient_dtype(dtype, Precision.MASTER) == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize(
    ("name", "dtypes", "message"),
    [
        ("master", [torch.float32], r'precision="master" is for bfloat16 or float16 weights, these are float32'),
        ("stochastic", [torch.float32, torch.float64], "these are float32, float64"),
        ("stochastic", [torch.bfloat16, torch.float16], r'choose precision="master"'),
    ],
)
def test_a_precision_without_effect_is_refused(name: str, dtypes: list[torch.dtype], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precision(name).check(dtypes)
