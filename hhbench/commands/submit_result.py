"""hhbench submit-result: whether somebody else's result may join a table."""

import argparse
from pathlib import Path

from hhbench.commands.shown import calm_libraries, literal, print_table
from hhbench.errors import HHBenchError

HELP = "check a result of somebody else before it joins a table; exits 1 if a check fails"
EXAMPLES = """examples:
  hhbench submit-result theirs.result.json                          PASS, WARN or FAIL for each check
  hhbench submit-result theirs.result.json --to docs/results/mini   keep it there if no check fails
  hhbench run --config theirs.result.json                           what no check replaces: running it again"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a result.json, as hhbench run wrote it")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="copy it there, under a name of its own, if accepted")


def call(args: argparse.Namespace) -> int:
    from hhbench import acceptance

    calm_libraries()
    made, findings = acceptance.examine(args.file)
    print_table(("check", "", "what it found"), ([f.check, f.outcome, literal(f.said)] for f in findings))
    failed = [finding.check for finding in findings if finding.outcome == "FAIL"]
    if failed or made is None:
        raise HHBenchError(f"{args.file} is refused: {', '.join(failed)}")
    print(f"accepted: {acceptance.keep(made, args.to) if args.to else args.file}")
    return 0
