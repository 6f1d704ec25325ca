"""Options that commands share, and the types of their values."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Option:
    """Something to choose: a flag of commands and, as a field of a configuration (see `configuring`), a key of its file.

    `help` is plain text; a `default` that is neither None nor a switch is added to it. `parse` reads the text of a flag and checks it:
    it raises `argparse.ArgumentTypeError`. `title` is the group in --help, where there are groups.
    """

    help: str
    default: Any = None
    parse: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    positional: bool = False
    title: str = ""

    def add(self, parser: "argparse._ActionsContainer", name: str, *, unset: Any = None, required: bool = False) -> None:
        """Register it as `--name`, or as a positional argument that may be left out. Not given, it is `unset`."""
        given: dict[str, Any] = {"default": unset, "help": self._described()}
        if isinstance(self.default, bool):
            parser.add_argument(flag(name), dest=name, action=argparse.BooleanOptionalAction, **given)
            return
        given |= {"metavar": self.metavar, "type": self.parse}
        if self.choices:
            given["choices"] = self.choices
        if self.positional:
            given["default"] = None  # argparse takes SUPPRESS here for a text to parse
            parser.add_argument(name, nargs=None if required else "?", **given)
        else:
            parser.add_argument(flag(name), dest=name, required=required, **given)

    def _described(self) -> str:
        shown = "" if self.default is None or isinstance(self.default, bool) else f" (default: {self.default})"
        return (self.help + shown).replace("%", "%%")


def flag(name: str) -> str:
    """The flag of an option or field."""
    return "--" + name.replace("_", "-")


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


MODEL = Option("local Hugging Face model directory, or a .gguf file", parse=Path, metavar="MODEL", required=True, positional=True)
BUDGET = Option('memory on the device: "14GB" (10^9), "13.5GiB" (2^30), "80%" of it', metavar="BYTES", title="memory")
BATCH = Option("sequences in a batch", 1, at_least(1), "N", title="training")
SEQ = Option("tokens in a sequence", 512, at_least(2), "N", title="training")
ACCUMULATE = Option("batches per optimizer step", 1, at_least(1), "N", title="training")
DTYPE = Option("dtype of the weights", "float32", choices=tuple(DTYPES), title="memory")
DEVICE = Option("cpu, cuda, ... (default: the accelerator if there is one, else cpu)", metavar="NAME", title="memory")
SEED = Option("seed of everything random", 0, at_least(0), "N", title="training")
SECONDS = Option("time for the solver", 5.0, between(0, math.inf), "S", title="memory")


def add_common(parser: argparse.ArgumentParser, *, budget_required: bool = True) -> None:
    """The model, its budget and the shape of one batch."""
    MODEL.add(parser, "model", required=True)
    BUDGET.add(parser, "budget", required=budget_required)
    named = {"batch": BATCH, "seq": SEQ, "accumulate": ACCUMULATE, "dtype": DTYPE, "device": DEVICE, "seed": SEED, "seconds": SECONDS}
    for name, one in named.items():
        one.add(parser, name, unset=one.default)
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Every command has it."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


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


def discard_stdout() -> None:
    """For a reader that left: else the interpreter tries again on its way out, and complains."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def bar_style() -> dict[str, Any]:
    """Arguments for tqdm: a short bar, so that the numbers after it have room; often for a person, now and then for a log."""
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    layout = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return {"bar_format": layout, "dynamic_ncols": sys.stderr.isatty(), "mininterval": seconds}
