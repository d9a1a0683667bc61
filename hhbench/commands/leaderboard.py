"""hhbench leaderboard: the tables of a folder of results."""

import argparse
import sys
from pathlib import Path

from hhbench.errors import HHBenchError

HELP = "every result below a folder, as tables"
EXAMPLES = """examples:
  hhbench leaderboard                      the tables of runs/
  hhbench leaderboard docs/results/mini --format csv > results.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    parser.add_argument("--format", default="md", help="md or csv (default: md)")


def call(args: argparse.Namespace) -> int:
    from hhbench import leaderboard, result
    from hhbench.profile import record

    results, complaints = result.find(args.folder)
    profiles, damaged = record.find(args.folder)
    for complaint in (*complaints, *damaged):
        print(complaint, file=sys.stderr)
    if not results:
        raise HHBenchError(f"no results below {args.folder}; hhbench run makes them")
    print(leaderboard.render(leaderboard.tables(results, profiles), args.format), end="")
    return 0
