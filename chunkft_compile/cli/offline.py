"""What `plan`, `fit` and `pareto` share when they plan for a device that is not here."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from chunkft_compile.budget import format_nbytes, parse_amount
from chunkft_compile.cli.choices import REACH, UPDATES, add_ingredients, add_optimizer, add_places, add_precision, add_update
from chunkft_compile.cli.options import DTYPES, at_least
from chunkft_compile.cli.planned import say
from chunkft_compile.offline import Choices, OfflineModel, Shape, read_config
from chunkft_compile.planner import Placement, Problem
from chunkft_compile.planner.devices import DEVICES, Device, find_device
from chunkft_compile.presets import PRESETS
from chunkft_compile.roofline import RooflineCosts
from chunkft_compile.runtime.precision import Precision


def add_shape(parser: argparse.ArgumentParser) -> None:
    """A model to plan for offline, the device, and the shape of one batch."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="preset, config.json, or a directory with one; weights are not read")
    parser.add_argument("--device", required=True, metavar="NAME", help=", ".join(DEVICES))
    parser.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="sequences in a batch (default: %(default)s)")
    parser.add_argument("--seq", type=at_least(2), default=512, metavar="N", help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--accumulate", type=at_least(1), default=1, metavar="N", help="batches per optimizer step (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_optimizer(parser)
    add_precision(parser)
    add_update(parser)
    add_ingredients(parser)
    add_places(parser)


def is_offline(model: Path, device: str | None) -> bool:
    """Whether this is to be planned for a device that is not here. Raises `ValueError` for a preset on a device that is."""
    named = (device or "").lower()
    if named in DEVICES and named != "cpu":
        return True
    weightless = not model.exists() or model.name == "config.json" or (model.is_dir() and not _holds_weights(model))
    if named == "cpu" and weightless and (str(model).lower() in PRESETS or model.exists()):
        return True
    if str(model).lower() in PRESETS and not model.exists():
        raise ValueError(
            f"{model} is a preset, which has no weights to plan with on {device or 'this machine'}: "
            f"name a device to model (--device {', '.join(DEVICES)}), or pass a model directory"
        )
    return False


def _holds_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors")) or any(directory.glob("*.bin"))


@dataclass(frozen=True)
class Question:
    """One model, optimizer and device, for any shape and budget."""

    model: str
    device: Device
    dtype: torch.dtype
    optimizer: str
    choices: Choices
    accumulating: bool
    precision: Precision = Precision.PLAIN

    @staticmethod
    def of(args: argparse.Namespace) -> "Question":
        """From parsed options. Raises `ValueError`."""
        device = find_device(args.device)
        update = args.update or "held"
        if args.accumulate > 1 and update != "held":
            raise ValueError(
                f"--accumulate {args.accumulate} needs --update held: gradients that add up over batches cannot be applied at once"
            )
        host = parse_amount(args.host_memory, "--host-memory") if args.host_memory is not None else None
        reach = REACH[args.weights]
        if args.weights == "disk" and not device.accelerator:  # on a CPU, the host is the device
            reach = (Placement.DEVICE, Placement.DISK)
        precision = Precision(args.precision or Precision.PLAIN)
        precision.check([DTYPES[args.dtype]])
        choices = Choices(UPDATES[update], args.state, reach, host, args.overlap, args.options)
        return Question(str(args.model), device, DTYPES[args.dtype], args.optimizer or "adamw", choices, args.accumulate > 1, precision)

    def capture(self, shape: Shape) -> OfflineModel:
        """The model at one shape; its weights are not allocated."""
        return OfflineModel(read_config(self.model), shape, self.dtype, self.device, precision=self.precision)

    def problem(self, model: OfflineModel, budget_nbytes: int) -> Problem:
        """The planner's question under a budget."""
        return model.problem(budget_nbytes, self.optimizer, self.choices, accumulating=self.accumulating)

    def describe(self, shape: Shape) -> str:
        """What is planned, in one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        copies = ", with copies beside compute" if self.choices.overlap else ""
        kept = "" if self.precision is Precision.PLAIN else f" (precision {self.precision})"
        return f"{self.model}, {shape.batch} x {shape.seq} tokens, {dtype}{kept}, {self.optimizer}, on {self.device.title}{copies}"


def offline_budget(text: str | None, device: Device) -> int:
    """The budget given, or all of the device but its reserve. Raises `ValueError` for one that the device does not have."""
    if text is None:
        reserve = format_nbytes(device.reserve_nbytes)
        say(f"budget {format_nbytes(device.budget_nbytes)}: the memory of {device.name}, less {reserve} that no budget can have")
        return device.budget_nbytes
    budget = parse_amount(text, "--budget", whole_nbytes=device.memory_nbytes)
    if budget > device.memory_nbytes:
        raise ValueError(
            f"--budget {text} is more than the {format_nbytes(device.memory_nbytes)} of {device.name}; "
            f"the most a budget should be is {device.budget_nbytes}B"
        )
    return budget


def say_modelled(model: OfflineModel, choices: Choices) -> None:
    """No reader should take this for a measurement."""
    device = model.device
    if choices.overlap and any(link.overlaps for link in device.links):
        print("copies beside compute are what the link allows: nobody has measured them on this device")
    print(f"modelled, not measured: times and temporaries of {device.title}; source: {device.source}")
    if isinstance(model.costs, RooflineCosts) and model.costs.unknown:
        print(f"no rule for the temporaries of {', '.join(sorted(model.costs.unknown))}: taken to be as large as their results")
