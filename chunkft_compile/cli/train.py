"""`chunkft train`: flags and a --config file become a `TrainConfig`. What a run does is in `fine_tune`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from chunkft_compile.cli.config import INSTEAD, TrainConfig
from chunkft_compile.cli.configuring import add_flags, merge, options, read_file, to_yaml
from chunkft_compile.cli.fine_tune import dry_run, fine_tune
from chunkft_compile.cli.options import add_debug, flag
from chunkft_compile.cli.stopping import Interrupted

_EPILOG = """\
data:
  .txt    plain text; documents may be separated by the model's end-of-text token, written out.
          It is cut into sequences of --seq tokens.
  .jsonl  one JSON object a line. Each line is padded to --seq tokens; with --packing, several share a sequence.
            {"messages": [{"role": ..., "content": ...}, ...]}   through the chat template; only the assistant's turns are learned
            {"prompt": ..., "completion": ...} or {"question": ..., "answer": ...}   prompts and questions are read, not learned
            {"text": ...}

examples:
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1.2GB --out ./tuned --seq 256
  chunkft train model.gguf --data chats.jsonl --packing --budget 80% --out ./tuned --steps 200 --accumulate 8
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1.2GB --out ./tuned --dry-run > run.yaml   (a file with all options)
  chunkft train --config run.yaml --lr 5e-5                                                         (flags override it)
  chunkft train ./SmolLM2-135M --data notes.txt --schedule plan.json --out ./tuned --seq 256
  chunkft train ./SmolLM2-135M --data notes.txt --budget 1GB --update auto --clip 0 --out ./tuned
  chunkft train ./model --data notes.txt --budget 6GB --dtype bf16 --precision master --out ./tuned
  chunkft train ./model --data train.txt --eval-data heldout.txt --budget 13.5GiB --out ./tuned --epochs 9 \\
    --eval-every 100 --patience 3 --keep-best --tensorboard ./runs
  chunkft train ./model --data notes.txt --budget 1GB --out ./tuned --json | jq -c 'select(.event == "eval")'

With --update immediate or auto, gradients are applied inside backward: there is no clipping (--clip 0) and no accumulation.
The result loads with AutoModelForCausalLM.from_pretrained("./tuned"). Ctrl-C or SIGTERM ends the run after the step under way, with a
checkpoint and the command that goes on from it; a second one ends it at once. Keys of a --config file are flags with _ for -."""


def add_parser(commands: Any) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "train",
        help="fine-tune all of a model inside a budget",
        description="Fine-tune every parameter of a causal language model inside a budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, TrainConfig)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with any of these options; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="plan, and print all options as such a file; train and save nothing")
    add_debug(parser)
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Train, save, report."""
    kept = {} if args.config is None else read_file(args.config, TrainConfig)
    fields = merge(TrainConfig, kept, vars(args), instead=INSTEAD)
    if missing := [name for name, option in options(TrainConfig).items() if option.required and name not in fields]:
        needed = ", ".join(options(TrainConfig)[name].metavar or name if name == "model" else flag(name) for name in missing)
        parser.error(f"the following arguments are required: {needed} (or {', '.join(missing)} in a --config file)")
    config = TrainConfig(**fields)
    try:
        if args.dry_run:
            dry_run(config)
        else:
            fine_tune(config, command=args.command_line)
    except KeyboardInterrupt as error:
        raise Interrupted.of(error, "interrupted; no model was saved") from None
    if args.dry_run and not config.json:
        print(to_yaml(config), end="")
    return 0
