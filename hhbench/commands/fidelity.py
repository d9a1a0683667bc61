"""hhbench fidelity: how close to softmax a converted model is, as tables."""

import argparse
from pathlib import Path

from hhbench.commands.shown import calm_libraries, print_table, watched
from hhbench.errors import UsageError

HELP = "how much of softmax a converted model kept, per layer and head"
EXAMPLES = """examples:
  hhbench fidelity converted/smollm2-hedgehog                  KL, entropy, order, overlap and cosine of each layer
  hhbench fidelity converted/smollm2-hedgehog --before        the same before transfer
  hhbench fidelity converted/smollm2-hedgehog --data text.txt --heads
  hhbench fidelity runs/glue/snli/hedgehog-.../model --plots plots --json > fidelity.json
  hhbench fidelity converted/smollm2-hedgehog --lengths 1,2,4,8 --examples 32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a converted model, or a run that kept its model")
    parser.add_argument("--data", metavar="DATA", help="another data set of its task, or your own (default: the run's)")
    parser.add_argument("--max-len", type=int, metavar="N", help="longest sequence in tokens (default: the run's)")
    parser.add_argument("--before", action="store_true", help="the model right after the swap, before transfer")
    parser.add_argument("--examples", type=int, default=32, metavar="N", help="of the test split (default: 32)")
    parser.add_argument(
        "--lengths", default="1,2,4", metavar="TIMES", help="times the length it was taught at (default: 1,2,4)"
    )
    parser.add_argument(
        "--top-k", type=int, default=10, metavar="K", help="keys that the overlap compares (default: 10)"
    )
    parser.add_argument("--heads", action="store_true", help="a row for every head")
    parser.add_argument("--attn", metavar="FILE.py:CLASS", help="your own attention, which no folder names by itself")
    parser.add_argument("--json", action="store_true", help="one JSON document in place of the tables")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots there (needs matplotlib)")


def call(args: argparse.Namespace) -> int:
    import json

    from hhbench.fidelity.folder import Fidelity, multiples_of, open_folder

    multiples = multiples_of(args.lengths)
    if args.examples < 1:
        raise UsageError(f"--examples must be at least 1, not {args.examples}")
    calm_libraries()
    subject = open_folder(args.folder, attn=args.attn, dataset=args.data, max_len=args.max_len)
    subject = subject.before_transfer() if args.before else subject
    with watched("fidelity") as watch:
        found = Fidelity.of(subject, examples=args.examples, multiples=multiples, top_k=args.top_k, watch=watch)
    plots = found.save_plots(args.plots) if args.plots else []
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
        return 0
    print(found.heading())
    print_table(*found.report.table(heads=args.heads))
    for headers, rows in found.further_tables():
        print()
        print_table(headers, rows)
    for path in plots:
        print(f"plot: {path}")
    return 0
