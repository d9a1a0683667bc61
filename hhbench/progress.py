"""How a long stage shows that it lives: a bar on a terminal, a plain line now and then elsewhere."""

import logging
import sys
import time
from typing import Any

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger("hhbench")
SECONDS_BETWEEN_LINES = 10.0


class Progress(Callback):
    """Counts the optimizer steps of fitting, or the batches of a test.

    Args:
        title: of the bar.
        total: steps or batches.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self._bar: Bar | None = None
        self._next_line = 0.0

    def _start(self, trainer: Any) -> None:
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        if not trainer.is_global_zero:
            return
        console = Console(file=sys.stderr)
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._bar.start()
            self._bar.add_task(self.title, total=self.total, note="")

    def _show(self, trainer: Any, done: int) -> None:
        if not trainer.is_global_zero:
            return
        shown = {name.split("/")[-1]: float(v) for name, v in trainer.progress_bar_metrics.items()}
        note = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            log.info("%s: %d/%d  %s", self.title, done, self.total, note)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        self._start(trainer)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._show(trainer, trainer.global_step)

    def on_train_end(self, *args: Any) -> None:
        self._stop()

    def on_test_start(self, trainer: Any, *args: Any) -> None:
        self._start(trainer)

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._show(trainer, batch_idx + 1)

    def on_test_end(self, *args: Any) -> None:
        self._stop()

    def on_exception(self, *args: Any) -> None:
        self._stop()
