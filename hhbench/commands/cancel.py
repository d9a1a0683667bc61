"""hhbench cancel: end a submission's jobs."""

import argparse

from hhbench.commands.status import add_submission
from hhbench.errors import UsageError

HELP = "cancel the jobs of a submission; what is done is kept"
EXAMPLES = """examples:
  hhbench cancel                             the latest submission below runs/
  hhbench cancel 20261127-091500-1a2b3c"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_submission(parser)


def call(args: argparse.Namespace) -> int:
    from hhbench import slurm, submit

    submission = submit.find_submission(args.out, args.submission)
    if submission.record.on != "slurm":
        raise UsageError(f"{submission.id} runs under torchrun: end it where it was started, with Ctrl-C")
    alive = sum(standing.alive for job in submission.jobs for standing in slurm.standings(job).values())
    for job in submission.jobs:
        slurm.cancel(job)
    print(f"cancelled {alive} task{'s' * (alive != 1)} of {submission.id}; submit the same again to go on")
    return 0
