"""hhbench submit: a run or a grid of runs as jobs of a cluster."""

import argparse
import logging
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hhbench import grid
from hhbench.commands.shown import calm_libraries
from hhbench.errors import HHBenchError, UsageError

if TYPE_CHECKING:
    from hhbench.submit import Draft

log = logging.getLogger("hhbench")

HELP = "a run or a grid of runs as jobs of a cluster: Slurm's, or torchrun on machines of your own"
EXAMPLES = """examples:
  hhbench submit --on slurm --plan --task glue --attn all --seeds 0:3      the scripts and what they cost; sends nothing
  hhbench submit --on slurm --cluster cluster.yaml --task glue --attn all --seeds 0:3 --throttle 8
  hhbench submit --on slurm --cluster cluster.yaml --task lm --attn hedgehog --devices 8 --num-nodes 2 --time 12:00:00
  hhbench submit --on torchrun --task recall --attn hedgehog --devices 2    on this machine, until it is done
  hhbench submit --on torchrun --task lm --attn elu --devices 8 --num-nodes 2 --hosts gpu1,gpu2
  hhbench status; hhbench collect --to results                             how far it is; what came of it"""
FOR_SLURM: Final = ("partition", "account", "time", "throttle", "signal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted="What is done is kept: submit the same again to go on.")
    group = parser.add_argument_group("the cluster")
    group.add_argument("--on", required=True, choices=("slurm", "torchrun"), help="what starts the processes")
    group.add_argument("--plan", action="store_true", help="show the scripts and what they cost, and send nothing")
    group.add_argument("--cluster", type=Path, metavar="FILE", help="what the cluster asks of every job, in YAML")
    group.add_argument("--partition", metavar="NAME", help="of Slurm (default: the file's)")
    group.add_argument("--account", metavar="NAME", help="of Slurm (default: the file's)")
    group.add_argument("--time", metavar="TIME", help="for each start of a trial, as 04:00:00 (default: the file's)")
    group.add_argument("--throttle", type=int, metavar="N", help="trials at a time (default: the file's, or no limit)")
    group.add_argument(
        "--signal", type=int, metavar="SECONDS", help="before the end of the time, a trial is told to save (120)"
    )
    group.add_argument("--hosts", metavar="NAMES", help="for torchrun with --num-nodes: the machines, as a,b")
    grid.add_arguments(parser)


def call(args: argparse.Namespace) -> int:
    from hhbench import slurm, torchrun

    given = {name: getattr(args, name) for name in FOR_SLURM if getattr(args, name) is not None}
    if args.on == "slurm":
        if args.hosts:
            raise UsageError("--hosts is for --on torchrun: Slurm chooses the machines")
        profile = slurm.profile_of(args.cluster, **given)
    elif given or args.cluster:
        raise UsageError(f"--{next(iter(given), 'cluster')} is for --on slurm: torchrun has no scheduler")
    calm_libraries()
    from hhbench.submit import draft as draft_of

    draft = draft_of(grid.trials_of(args, elsewhere=True), on=args.on, workdir=Path.cwd())
    record = draft.submission.record
    if args.on == "slurm":
        scripts = draft.slurm_scripts(profile)
    else:
        hosts = torchrun.hosts_of(args.hosts, record.nodes)
        scripts = {"torchrun.sh": draft.torchrun_script(hosts)}
    for line in draft.lines(profile if args.on == "slurm" else None):
        print(line, flush=True)
    if args.plan:
        for name, text in scripts.items():
            print(f"\n--- {name}\n{text}", end="")
        if args.on == "torchrun":
            print("\n--- to start it")
            _print_commands(draft, hosts)
        print("\nplan: nothing written, nothing sent")
        return 0
    if not draft.missing:
        print("all done already: nothing to send")
        return 0
    if args.on == "slurm":
        slurm.check(profile, nodes=record.nodes, largest_index=max(draft.missing))
    from hhbench.runner import fetch

    fetch(trial.plan for trial in draft.trials)  # machines that compute often have no network
    draft.write(scripts)
    if args.on == "slurm":
        _send(draft, list(scripts))
    elif hosts:
        print("start on each machine, all of which need this folder:")
        _print_commands(draft, hosts)
    else:
        code = subprocess.run(["bash", str(draft.submission.folder / "torchrun.sh")], check=False).returncode
        print(f"submission: {draft.submission.folder}")
        return code
    print(f"submission: {draft.submission.folder}")
    print(f"next: hhbench status {shlex.quote(str(draft.submission.folder))}")
    return 0


def _send(draft: "Draft", scripts: list[str]) -> None:
    """Both scripts or none."""
    from hhbench import slurm

    folder = draft.submission.folder
    sent: str | None = None
    try:
        for name in scripts:
            slurm.send(folder / name, test=True)
        for name in scripts:
            sent = slurm.send(folder / name, after=sent)
            print(f"sent {name}: job {sent}", flush=True)
    except HHBenchError:
        if sent is not None:
            for name in draft.submission.jobs:
                slurm.cancel(name)
        shutil.rmtree(folder)
        raise


def _print_commands(draft: "Draft", hosts: list[str]) -> None:
    from hhbench import torchrun

    for line in torchrun.commands(draft.submission.folder / "torchrun.sh", hosts):
        print(f"  {line}")
