"""The learning rate over a run."""

import math

SHAPES = ("constant", "linear", "cosine")


def lr_factor(step: int, *, warmup: int, steps: int, shape: str = "cosine") -> float:
    """Part of the highest learning rate at `step` (from 0): up in a line, then as `shape` says; never 0 in a step that runs.

    "constant" stays, "linear" falls in a line, "cosine" in half a cosine; both would be 0 in the step after the last.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
