"""What the planner may choose from, as options of the commands."""

import argparse
from collections.abc import Callable

from chunkft_compile.cli.options import Option, at_least
from chunkft_compile.planner import Placement, Update
from chunkft_compile.planner.methods import METHODS
from chunkft_compile.runtime.modelled_optimizers import OPTIMIZERS
from chunkft_compile.runtime.precision import Precision

UPDATES = {"held": (Update.HELD,), "auto": (Update.HELD, Update.IMMEDIATE), "immediate": (Update.IMMEDIATE,)}
REACH = {
    "device": (Placement.DEVICE,),
    "host": (Placement.DEVICE, Placement.HOST),
    "disk": (Placement.DEVICE, Placement.HOST, Placement.DISK),
}


OPTIMIZER = Option(
    "torch optimizer (default: adamw; on this machine fused, where there is such a kernel)", choices=tuple(OPTIMIZERS), title="training"
)
PRECISION = Option(
    "what the optimizer computes in where weights are bf16: their own dtype (plain), fp32 weights kept beside them (master), "
    "or fp32 copies for each update, rounded back at random (stochastic) (default: plain)",
    choices=tuple(Precision),
    title="memory",
)
UPDATE = Option(
    "when gradients are applied: held until step(), immediate inside backward, auto for the better (default: held)",
    choices=tuple(UPDATES),
    title="memory",
)
PREFER = Option(
    "the fastest sweep, or the one with the fewest steps, for fresh parameters (default: time)",
    choices=("time", "fresh"),
    title="memory",
)
MAX_STEPS = Option("most steps of a sweep (default: no limit)", None, at_least(1), "N", title="memory")


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    """The optimizer to plan for."""
    OPTIMIZER.add(parser, "optimizer")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """What the optimizer computes in. Not given, it is None and means plain."""
    PRECISION.add(parser, "precision")


def add_update(parser: argparse.ArgumentParser) -> None:
    """When gradients are applied. Not given, it is None and means held."""
    UPDATE.add(parser, "update")


def add_ingredients(parser: argparse.ArgumentParser) -> None:
    """Forced ingredients of a plan."""
    parser.add_argument(
        "--options",
        type=_list_of("options"),
        metavar="LIST",
        help="only these options of segments, with commas between: save, cheap, inputs, offload, tiled (all tile counts), 'tiled 4'; "
        "a segment that has none of them keeps its own",
    )
    parser.add_argument(
        "--state",
        type=_places,
        metavar="LIST",
        help="only these places for optimizer state between uses: device, host, disk, with commas between (default: any)",
    )


def add_search(parser: argparse.ArgumentParser) -> None:
    """What makes a plan better, and the most steps of a sweep."""
    PREFER.add(parser, "prefer")
    MAX_STEPS.add(parser, "max_steps")


def add_places(parser: argparse.ArgumentParser) -> None:
    """What only devices that are not here can be planned with."""
    parser.add_argument(
        "--weights", choices=REACH, default="device", help="how far away weights may live between uses (default: %(default)s)"
    )
    parser.add_argument("--host-memory", metavar="BYTES", help='most bytes kept in host memory, as "64GB" (default: no limit)')
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="count on transfers beside compute, as the runtime makes them; how well a device keeps up with both was never measured",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """One known method instead of the planner's choice."""
    parser.add_argument(
        "--method",
        choices=METHODS,
        metavar="NAME",
        help="plan exactly one known method, for a device that is not here: "
        + "; ".join(f"{name} ({method.source})" for name, method in METHODS.items()),
    )


def _list_of(what: str) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if not all(names):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what} with commas between")
        return names

    return parse


def _places(text: str) -> tuple[Placement, ...]:
    """An argparse type: places with commas between."""
    names = _list_of("places")(text)
    if strange := [name for name in names if name not in tuple(Placement)]:
        raise argparse.ArgumentTypeError(f"{strange[0]!r} is no place: {', '.join(Placement)}, with commas between")
    return tuple(place for place in Placement if place in names)
