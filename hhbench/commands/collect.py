"""hhbench collect: what came of a submission."""

import argparse
from collections import Counter
from pathlib import Path

from hhbench.commands.status import add_submission

HELP = "the tables of a submission's results, its failures, and copies of the results"
EXAMPLES = """examples:
  hhbench collect                            the latest submission below runs/; exits 1 if a trial failed
  hhbench collect 20261127-091500-1a2b3c --to docs/results/mine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_submission(parser)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="copy the results there, each checked")


def call(args: argparse.Namespace) -> int:
    from hhbench import leaderboard, submit

    submission = submit.find_submission(args.out, args.submission)
    trials = submit.progress(submission)
    results = [p.result for p in trials if p.result is not None]
    if results:
        print(leaderboard.render(leaderboard.tables(results)))
    if args.to is not None:
        print(f"copied {len(submit.collect(trials, args.to))} of {len(trials)} results to {args.to}")
    failed = [p for p in trials if p.word == "failed"]
    if failed:
        print(f"{len(failed)} of {len(trials)} failed:")
    for p in failed:
        print(f"  {p.trial['title']}: {p.note}\n    log: {submission.log(p.index)}")
    counts = Counter(p.word for p in trials)
    for word in ("running", "pending", "stopped"):
        if counts[word]:
            print(f"{counts[word]} of {len(trials)} {word}: hhbench status {submission.folder}")
    return 1 if failed else 0
