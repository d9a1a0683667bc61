"""hhbench status: how far a submission is."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Final

from hhbench.commands.shown import literal, print_table

HELP = "how far a submission is: each trial done, failed, running, pending or stopped"
EXAMPLES = """examples:
  hhbench status                             the latest submission below runs/
  hhbench status 20261127-091500-1a2b3c      by its id, or the start of it
  hhbench status --out /scratch/runs"""
STYLES: Final = {"done": "green", "failed": "bold red", "stopped": "yellow", "running": "none", "pending": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_submission(parser)


def add_submission(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which submission is meant."""
    parser.add_argument("submission", nargs="?", help="its id, the start of it, or its folder (default: the latest)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where results lie (default: runs)")


def call(args: argparse.Namespace) -> int:
    from hhbench import submit
    from hhbench.leaderboard import counted

    submission = submit.find_submission(args.out, args.submission)
    trials = submit.progress(submission)
    print_table(
        ("number", "trial", "state", ""),
        (
            (f"{p.index:04d}", literal(p.trial["title"]), f"[{STYLES[p.word]}]{p.word}[/]", literal(p.note))
            for p in trials
        ),
    )
    for teacher, reason in submit.failures_of_teachers(submission):
        print(f"the shared teacher of {teacher['title']} failed: {reason}")
    counts = Counter(p.word for p in trials)
    shown = ", ".join(f"{counts[word]} {word}" for word in submit.WORDS if counts[word])
    print(f"{submission.id}: {counted(len(trials), 'trial')}: {shown}")
    return 0
