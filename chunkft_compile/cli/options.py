"""Options that both commands share, and the types of their values."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}


def add_common(parser: argparse.ArgumentParser, *, budget_required: bool = True) -> None:
    """The model, its budget and the shape of one batch."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="local Hugging Face model directory, or a .gguf file")
    parser.add_argument(
        "--budget", required=budget_required, metavar="BYTES", help='memory on the device: "14GB" (10^9), "13.5GiB" (2^30), "80%%" of it'
    )
    parser.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="sequences in a batch (default: %(default)s)")
    parser.add_argument("--seq", type=at_least(2), default=512, metavar="N", help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--accumulate", type=at_least(1), default=1, metavar="N", help="batches per optimizer step (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: %(default)s)")
    parser.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one, else cpu)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of everything random (default: %(default)s)")
    parser.add_argument("--seconds", type=between(0, math.inf), default=5.0, metavar="S", help="time for the solver (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer not below `least`."""

    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() else None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return value

    return parse


def between(least: float, most: float, *, included: bool = False) -> Callable[[str], float]:
    """An argparse type: a number above `least` (or equal, if `included`) and below `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value < most if included else least < value < most):
            limit = f"{'at least' if included else 'above'} {least:g}" + ("" if math.isinf(most) else f" and below {most:g}")
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limit}")
        return value

    return parse


def pick_device(name: str | None) -> torch.device:
    """The device named, or the accelerator if there is one, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device name: cpu, cuda, cuda:1, ...") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise ValueError(f"--device {name!r} is not on this machine: it has the cpu and {accelerator or 'no accelerator'}")
    return device


def bar_style() -> dict[str, Any]:
    """Arguments for tqdm: a short bar, so that the numbers after it have room; often for a person, now and then for a log."""
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    layout = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return {"bar_format": layout, "dynamic_ncols": sys.stderr.isatty(), "mininterval": seconds}
