"""What the commands show: tables, how far they are, and nothing of what the libraries say to themselves."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("hhbench")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout, as wide as the terminal. Its cells may hold rich's markup; `literal` takes it from a text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def literal(text: str) -> str:
    """An attention's options stand in brackets, which rich would take for a style."""
    from rich.markup import escape

    return escape(text)


@contextmanager
def watched(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Shows on stderr how far a command is: a bar on a terminal, a line now and then elsewhere.

    What it gives is called with the steps that are done, with all that there are, and with what is under way.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hhbench.progress import SECONDS_BETWEEN_LINES

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    due = time.monotonic() + SECONDS_BETWEEN_LINES
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def watch(done: int, total: int, what: str) -> None:
            nonlocal due
            bar.update(task, completed=done, total=total, description=literal(what))
            if not console.is_terminal and time.monotonic() >= due:
                due = time.monotonic() + SECONDS_BETWEEN_LINES
                log.info("%s: %d/%d  %s", title, done, total, what)

        yield watch


def calm_libraries() -> None:
    """Loading reports and progress bars of the libraries tell a user nothing about a run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "transformers",
        "datasets",
        "huggingface_hub",
        "timm",
        "lightning.pytorch",
        "lightning.fabric",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
