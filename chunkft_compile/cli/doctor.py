"""`chunkft doctor`: what this machine has and lacks, and whether a model can be trained in chunks."""

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.options import DTYPES, at_least, pick_device
from chunkft_compile.cli.planned import say
from chunkft_compile.examining import Examination, examine
from chunkft_compile.offline import build_fake, read_config
from chunkft_compile.presets import PRESETS
from chunkft_compile.pretrained import check_model, load_weights
from chunkft_compile.runtime.allocators import install
from chunkft_compile.runtime.native import BuildError
from chunkft_compile.runtime.stores import Stores, measure_link

_EPILOG = """\
examples:
  chunkft doctor
  chunkft doctor ./SmolLM2-135M
  chunkft doctor llama-3-8b --seq 1024 --dtype bf16

A preset, a config.json or a directory with one is looked at without its weights. A parameter is listed as dense where no slicing rule is
known for its gradient: it is computed whole and cut, which is right, but costs the bytes of the whole gradient while it is made."""

_NEEDED = ("torch", "ortools", "networkx", "safetensors", "tabulate", "tqdm")
_EXTRAS = {
    "transformers": ("models and tokenizers of Hugging Face", "pip install 'chunkft_compile[hf]'"),
    "gguf": ("reading .gguf files", "pip install 'chunkft_compile[hf]'"),
    "tensorboard": ("chunkft train --tensorboard", "pip install 'chunkft_compile[tensorboard]'"),
    "plotly": ("page of `chunkft report`", "pip install 'chunkft_compile[report]'"),
    "bitsandbytes": ("8-bit optimizers", "pip install 'chunkft_compile[8bit]'"),
}

Row = tuple[str, str, str]


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine has and lacks, and whether a model can be trained in chunks",
        description="Show versions, device, memory and disk, what is missing, and what a model's gradients can be cut into.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="preset, config.json, model directory or .gguf file")
    parser.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="sequences in a batch (default: %(default)s)")
    parser.add_argument("--seq", type=at_least(2), default=128, metavar="N", help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: %(default)s)")
    parser.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda, ... (default: the accelerator if there is one, else cpu)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look and print."""
    device = pick_device(args.device)
    if args.model is not None and not _is_weightless(args.model):
        check_model(args.model)
    print(tabulate([*_versions(), *_machine(device), *_disk(device), _hook(device)], ("what", "found", "way out")))
    if args.model is not None:
        say(f"capturing {args.model}, {args.batch} x {args.seq} tokens")
        print()
        print("\n".join(_told(_examine(args), str(args.model))))
    return 0


def _versions() -> Iterator[Row]:
    yield ("python", platform.python_version(), "")
    for name in _NEEDED:
        yield (name, version(name), "")
    for name, (what, command) in _EXTRAS.items():
        try:
            yield (name, version(name), "")
        except PackageNotFoundError:
            yield (name, f"not installed: no {what}", command)


def _machine(device: torch.device) -> Iterator[Row]:
    yield ("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch", "")
    yield ("memory", f"{format_nbytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}", "")
    if device.type == "cpu":
        found = torch.accelerator.current_accelerator()
        yield ("accelerator", str(found or "none that this build of torch sees"), "" if found else "see pytorch.org for a build with CUDA")
    else:
        free, total = torch.accelerator.get_memory_info(device)
        yield (str(device), f"{format_nbytes(total)}, {format_nbytes(free)} of it free", "")


def _disk(device: torch.device) -> Iterator[Row]:
    directory = Path(tempfile.gettempdir())
    yield ("store", f"{directory}, {format_nbytes(shutil.disk_usage(directory).free)} free", "another one: compile(..., store=DIRECTORY)")
    for place in Stores(device, None).placements:
        link = measure_link(device, None, place)
        speeds = f"{format_nbytes(link.read_bytes_per_s)}/s to the device, {format_nbytes(link.write_bytes_per_s)}/s back"
        yield (f"{place} speed", f"{speeds} (16 MiB at once)", "")


def _hook(device: torch.device) -> Row:
    if device.type != "cpu":
        return ("memory guard", "on, by the statistics of the allocator", "")
    try:
        install()
    except BuildError as error:
        return ("memory guard", f"off: {' '.join(str(error).split())}", "install a C++ compiler (g++)")
    return ("memory guard", "on, by an allocator hook", "")


def _examine(args: argparse.Namespace) -> Examination:
    dtype = DTYPES[args.dtype]
    if _is_weightless(args.model):
        model, mode = build_fake(read_config(str(args.model)), dtype)
        with mode:
            ids = torch.zeros(args.batch, args.seq, dtype=torch.int64)
    else:
        model, ids = load_weights(args.model, dtype, torch.device("cpu")), torch.zeros(args.batch, args.seq, dtype=torch.int64)
        model.train()
    model.config.use_cache = False  # type: ignore[union-attr]
    return examine(model, (), {"input_ids": ids, "labels": ids})


def _is_weightless(model: Path) -> bool:
    """A preset, a config.json or a directory with one: the graph does not depend on the values of weights."""
    if model.exists():
        return model.name == "config.json" or (model / "config.json").is_file()
    return str(model).lower() in PRESETS


def _told(found: Examination, name: str) -> Iterator[str]:
    yield (
        f"{name}: {found.parameters:,} parameters, {found.trainable:,} of them trainable; "
        f"{len(found.segments)} segments of {found.kinds} kinds: {', '.join(segment for segment, _ in _ends(found))}"
    )
    if found.untrained:
        yield f"the loss does not depend on {', '.join(found.untrained)}: freeze them with requires_grad_(False) before compile()"
    if not found.dense:
        yield "every gradient can be cut into rows"
        return
    count, total = len(found.dense), format_nbytes(sum(gradient.nbytes for gradient in found.dense))
    which = "gradient of 1 parameter" if count == 1 else f"gradients of {count} parameters"
    yield f"no slicing rule for the {which}, {total}; each is computed whole and cut:"
    yield tabulate([(gradient.name, format_nbytes(gradient.nbytes)) for gradient in found.dense], ("parameter", "bytes while it is made"))


def _ends(found: Examination) -> list[tuple[str, str]]:
    """The first and the last segments, with dots between them."""
    segments = list(found.segments)
    return segments if len(segments) <= 6 else [*segments[:3], ("...", ""), *segments[-2:]]
