"""hhbench new: an attention or a task to start from."""

import argparse
from pathlib import Path

HELP = "write a working attention or task with its test, to start from"
EXAMPLES = """examples:
  hhbench new attention my-map                      a feature map: baselines/my_map.py and its test in a checkout
  hhbench new attention my-block --rung mixer       a whole block
  hhbench new task my-task --folder .               my_task.py and its test in this folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("attention", "task"))
    parser.add_argument("name", help="lower-case words joined by dashes; the file's name has underscores")
    parser.add_argument(
        "--rung",
        choices=("map", "attention", "mixer"),
        help="a feature map, what happens between q, k, v and the output, or a whole block (default: map)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write (default: the checkout of hhbench that you are in, or else here)"
    )


def call(args: argparse.Namespace) -> int:
    from hhbench import scaffold

    written = scaffold.new(args.what, args.name, rung=args.rung, folder=args.folder)
    for path in written.files:
        print(f"wrote {path}")
    print("next:")
    for line in written.commands:
        print(f"  {line}")
    return 0
