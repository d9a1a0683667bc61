"""hhbench generate: text from a converted decoder."""

import argparse
import logging
import sys
from pathlib import Path

from hhbench.commands.shown import calm_libraries

log = logging.getLogger("hhbench")

HELP = "text from a converted decoder, and what it keeps of the tokens"
EXAMPLES = """examples:
  hhbench generate converted/smollm2-hedgehog --prompt "The hedgehog is"      greedy; decodes from a constant state
  hhbench generate converted/smollm2-hedgehog --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
  hhbench generate converted/smollm2-hedgehog --prompt - --max-new-tokens 500 < prompt.txt
  hhbench generate runs/lm/wikipedia/hedgehog-.../model --prompt "In 1905" --num-beams 4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a converted model, or a run that kept its model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on from; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample with it (default: the likeliest token)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples (default: 0)")
    parser.add_argument("--num-beams", type=int, default=1, metavar="K", help="beam search (default: 1, none)")
    parser.add_argument("--attn", metavar="FILE.py:CLASS", help="your own attention, which no folder names by itself")


def call(args: argparse.Namespace) -> int:
    from hhbench.generation import Writer

    calm_libraries()
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    writer = Writer(args.folder, attn=args.attn)
    log.info("%s", writer.kept(num_beams=max(args.num_beams, 1)).line())
    written = writer.write(
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        num_beams=args.num_beams,
        stream=True,
    )
    log.info("%s", written.line())
    return 0
