"""hhbench sweep: a grid of runs on this machine."""

import argparse
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from hhbench import grid
from hhbench.commands.shown import calm_libraries, literal, print_table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from hhbench.sweep import Outcome, Run, Watch

log = logging.getLogger("hhbench")

HELP = "a grid of runs: every combination of tasks, data sets, attentions, recipes, seeds and other settings"
EXAMPLES = """examples:
  hhbench sweep --task glue --attn hedgehog,t2r,softmax --seeds 0:3    nine runs on each data set; teachers first
  hhbench sweep --task all --attn all --dry-run                        only the plan: what is done, what is left
  hhbench sweep --task recall --attn hedgehog,taylor --grid lr=1e-3,3e-3
  hhbench sweep --task lm --attn hedgehog,softmax --grid option.activation=softmax,exp
  hhbench sweep --task glue --attn 't2r,hedgehog[activation=exp]' --recipe hedgehog,no-transfer --parallel 4
  hhbench sweep --config grid.yaml --seeds 0:5                         lists in YAML: `attn: [hedgehog, t2r]`"""
STYLES: Final = {"running": "", "done": "green", "failed": "bold red", "stopped": "yellow"}
ROWS: Final = 12  # of what is running, at most: a live table must fit on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted="What is done is kept: run the same command to go on.")
    grid.add_arguments(parser)
    group = parser.add_argument_group("the sweep")
    group.add_argument(
        "--parallel", type=int, metavar="N", help="runs at once (default: as many as there are GPUs for; 1 on a CPU)"
    )
    group.add_argument("--dry-run", action="store_true", help="show the plan and stop")


def call(args: argparse.Namespace) -> int:
    calm_libraries()
    trials = grid.trials_of(args)
    from hhbench import stopping
    from hhbench.sweep import Agenda, carry_out

    agenda = Agenda.of(trials, args.parallel)
    print_table(("run", "state", "estimated training"), ([literal(cell) for cell in row] for row in agenda.rows()))
    for line in agenda.lines():
        print(line, flush=True)
    if args.dry_run:
        log.info("dry run: nothing done")
        return 0
    with _shown() as watch:
        outcome = carry_out(agenda, watch)
    _print_tables(outcome, trials[0].config.out)
    for run in outcome.stopped:
        log.info("stopped: %s; run the same command to go on", run.trial.title)
    if outcome.failures:
        print(f"{len(outcome.failures)} of {len(outcome.runs)} failed:")
        for run in outcome.failures:
            print(f"  {run.trial.title}: {run.note}\n    log: {run.log}")
        return 1
    return stopping.CODE if outcome.stopped else 0


def _print_tables(outcome: "Outcome", out: "Path") -> None:
    """The tables that the sweep's results stand in."""
    if outcome.results:
        from hhbench import leaderboard, result

        keys = {one.key for one in outcome.results}
        tables = leaderboard.tables([*result.find(out)[0], *outcome.results])
        print(leaderboard.render([table for table in tables if keys & table.keys]))


@contextlib.contextmanager
def _shown() -> "Iterator[Watch]":
    """Shows on stderr how far a sweep is: a live table on a terminal, a line for each event elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    # Refreshed by hand: a thread of its own would be there while processes are started.
    live = Live(console=console, auto_refresh=False, transient=True)

    def watch(runs: "Sequence[Run]", changed: "Sequence[Run]") -> None:
        for run in changed:
            text = _event(run, sum(each.state not in ("waiting", "running") for each in runs), len(runs))
            if not console.is_terminal:
                log.info("%s", text)
            elif run.state != "running":
                live.console.print(f"[{STYLES[run.state]}]{literal(text)}[/]")
        if console.is_terminal:
            live.update(_table(runs), refresh=True)

    with live if console.is_terminal else contextlib.nullcontext():
        yield watch


def _event(run: "Run", ended: int, total: int) -> str:
    if run.state == "running":
        return f"[{ended}/{total}] started {run.trial.title}; log: {run.log}"
    from hhbench.sweep import duration

    note = f": {run.note}" if run.note else ""
    where = f"; log: {run.log}" if run.state == "failed" else ""
    return f"[{ended}/{total}] {run.state} {run.trial.title}{note} ({duration(run.seconds)}){where}"


def _table(runs: "Sequence[Run]") -> "Table":
    from rich.table import Table

    from hhbench.sweep import duration

    states = Counter(run.state for run in runs)
    counts = ", ".join(f"{states[state]} {state}" for state in ("running", "waiting", "done", "failed", "stopped"))
    table = Table("run", "for", "its last line", box=None, pad_edge=False, header_style="bold", caption=counts)
    table.caption_justify = "left"
    table.columns[2].no_wrap = True
    for run in [run for run in runs if run.state == "running"][:ROWS]:
        table.add_row(literal(run.trial.title), duration(run.seconds), literal(run.note))
    return table
