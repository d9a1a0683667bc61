"""hhbench run: train or convert, test, tabulate."""

import argparse
import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hhbench.commands.settings import add_settings, configs_of
from hhbench.commands.shown import calm_libraries
from hhbench.errors import HHBenchError, in_one_line
from hhbench.result import TOLD, write

if TYPE_CHECKING:
    from hhbench.result import Result

log = logging.getLogger("hhbench")

HELP = "train or convert, test, and print the table row"
EXAMPLES = """examples:
  hhbench run --task glue --attn hedgehog                            all mini data sets of the task
  hhbench run --task glue,lm --attn hedgehog,t2r --seed 1            several at once
  hhbench run --task glue --dataset reviews.csv --attn hedgehog      your own data: text, (text2,) label
  hhbench run --task recall --attn my_attn.py:MyAttention            your own attention
  hhbench run --task glue --attn hedgehog --option activation=exp    an attention's option
  hhbench run --task lm --attn elu --tune lr=1e-3,3e-3               learning rates; the validation split picks
  hhbench run --task glue --attn hedgehog --devices 2 --accelerator cpu
  hhbench run --config run.yaml --seed 2                             settings from a file; flags override it
  hhbench run --config runs/.../result.json --out again              a result, run again
  hhbench run --task imagenet --attn softmax --dry-run               only say what would be done"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted="What is done is kept: run the same command with --resume to go on.")
    add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    parser.add_argument("--teacher-only", action="store_true", help="train the teachers that the runs share, and stop")


def call(args: argparse.Namespace) -> int:
    from hhbench.stopping import Stopped, heeding

    told = Path(path) if (path := os.environ.get(TOLD)) else None
    if told is None:
        with heeding():
            return _run(args, None)
    try:
        with heeding():  # before anything heavy is imported: a cluster's signal may come then
            return _run(args, told)
    except BaseException as error:
        suffix = ".stopped" if isinstance(error, Stopped | KeyboardInterrupt) else ".failed"
        said = str(error) if isinstance(error, HHBenchError) else in_one_line(error)
        place = told.with_name(told.name + suffix)
        with contextlib.suppress(FileExistsError), place.open("x") as file:  # the first that fails knows why
            file.write(said + "\n")
        raise


def _run(args: argparse.Namespace, told: Path | None) -> int:
    configs = configs_of(args)
    from hhbench import ranks, stopping

    if ranks.launched().by == "torchrun":
        stopping.end_with(os.getppid())  # a rank whose agent is gone would hold its device, and the run's lock
    ranks.connect(configs[0])
    from hhbench.runner import execute, expand, fetch, prepare, train_teacher

    if ranks.rank() > 0:
        log.setLevel(logging.ERROR)
    calm_libraries()
    plans = [prepare(one) for config in configs for one in expand(config)]
    for plan in plans if told is None else ():
        for line in plan.lines():
            log.info("%s", line)
    if args.dry_run:
        log.info("dry run: %d run%s planned, nothing done", len(plans), "" if len(plans) == 1 else "s")
        return 0
    fetch(plans)
    if args.teacher_only:
        with ranks.one_line_for_lost_ranks():
            teachers = {train_teacher(plan.given) for plan in plans} - {None}
        _tell(told, teachers)
        for folder in sorted(map(str, teachers)) if told is None and ranks.rank() == 0 else ():
            print(f"teacher: {folder}")
        return 0
    with ranks.one_line_for_lost_ranks():
        results = [execute(plan.given) for plan in plans]
    _tell(told, [path for _, path in results])
    if told is None and ranks.rank() == 0:
        _print_tables(results, configs[0].out)
    return 0


def _tell(told: Path | None, paths: Iterable[Path | None]) -> None:
    """Write what came of it where who started this process looks for it."""
    from hhbench.ranks import rank

    if told is not None and rank() == 0:
        write(told, "\n".join(str(path.resolve()) for path in paths if path is not None).encode())


def _print_tables(made: "list[tuple[Result, Path]]", out: Path) -> None:
    from hhbench import leaderboard, result

    everything, _ = result.find(out)
    shown: list[leaderboard.Table] = []
    for one, _ in made:
        table = leaderboard.table_of(one, everything)
        if all(table.keys != other.keys for other in shown):
            shown.append(table)
    print(leaderboard.render(shown))
    for _, path in made:
        print(f"result: {path}")
