"""Every generator goes on where it was."""

import io
import random

import numpy
import torch

from chunkft_compile.runtime.rng import rng_states, set_rng_states


def _draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(numpy.random.random()), float(numpy.random.normal()), float(torch.rand(()))]


def test_the_same_numbers_come_again() -> None:
    device = torch.device("cpu")
    random.gauss(0, 1), numpy.random.normal()  # each keeps a second number for the next call
    file = io.BytesIO()
    torch.save(rng_states(device), file)
    expected = _draw()
    assert _draw() != expected
    set_rng_states(torch.load(io.BytesIO(file.getvalue()), weights_only=True), device)
    assert _draw() == expected
