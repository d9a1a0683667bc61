"""hhbench data: what is needed, what is there, and fetching it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hhbench.commands.shown import print_table
from hhbench.config import RunConfig
from hhbench.errors import HHBenchError, unknown_name

if TYPE_CHECKING:
    from hhbench.data import PackageFile
    from hhbench.task import Task

HELP = "data and weights: what is needed, what is there"
EXAMPLES = """examples:
  hhbench data list
  hhbench data fetch glue                  everything that glue needs at mini; then HHBENCH_OFFLINE=1 works
  hhbench data verify"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("list", "fetch", "verify"))
    parser.add_argument("name", nargs="*", help="files, data sets or tasks; all if left out")


def call(args: argparse.Namespace) -> int:
    from hhbench import data

    needs = _needs(args.name)
    if args.what == "fetch":
        for file in {file.name: file for _, _, files in needs for file in files}.values():
            print(f"{file.name}: {data.fetch(file)}")
        for task, config, _ in needs:
            name = str(config.dataset)
            if name in args.name and not task.dataset(name).files:  # of the hub, or generated: into others' caches
                task.build_model(config, task.load_data(config))
                print(f"{name}: ready")
        return 0
    users: dict[str, list[str]] = {}
    states: dict[str, tuple[PackageFile, str]] = {}
    for task, _, files in needs:
        for file in files:
            states[file.name] = (file, data.status(file))
            users.setdefault(file.name, [])
            users[file.name] += [task.name] if task.name not in users[file.name] else []
    print_table(
        ("name", "status", "MB", "used by", "licence", "holds"),
        ((n, state, f.megabytes, ", ".join(users[n]), f.licence, f.holds) for n, (f, state) in states.items()),
    )
    if args.what == "verify":
        wrong = [name for name, (_, state) in states.items() if state == "corrupt"]
        if wrong:
            raise HHBenchError(f"damaged: {', '.join(wrong)}. Fetch again: hhbench data fetch {' '.join(wrong)}")
    return 0


def _needs(names: Sequence[str]) -> "list[tuple[Task, RunConfig, tuple[PackageFile, ...]]]":
    """For every data set that is named by itself, by its task or by a file of it: its config and its pinned files."""
    from hhbench.runner import prepare
    from hhbench.task import TASKS

    found: list[tuple[Task, RunConfig, tuple[PackageFile, ...]]] = []
    known: set[str] = set()
    for task_name in TASKS.names():
        task = TASKS.get(task_name).build()
        for name in task.datasets:
            # A set that is the paper's alone is at its size; what it needs may depend on the regime.
            preset = "paper" if name in {*task.suites["paper"]} - {*task.suites["mini"]} else "mini"
            configs = [
                prepare(RunConfig(task=task_name, attn="softmax", dataset=name, preset=preset, regime=regime)).config
                for regime in task.regimes
            ]
            config, files = configs[0], tuple(dict.fromkeys(file for c in configs for file in task.files(c)))
            called = {task_name, name, *(f.name for f in files)}
            known |= called
            if not names or called & set(names):
                files = tuple(f for f in files if not names or {task_name, name, f.name} & set(names))
                found.append((task, config, files))
    for name in names:
        if name not in known:
            raise unknown_name("file, data set or task", name, known)
    return found
