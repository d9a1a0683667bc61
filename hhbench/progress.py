"""How a long stage shows that it lives: a bar on a terminal, a plain line now and then elsewhere."""

import logging
import math
import sys
import time
from typing import Any

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger("hhbench")
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.1  # of a bar


class Progress(Callback):
    """Counts the optimizer steps of fitting, or the batches of a test. Beside the bar stands what the stage has in
    `shown`; it is read only when it is shown, as a GPU has to be waited for.

    Args:
        title: of the bar.
        total: steps or batches.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self._bar: Bar | None = None
        self._next = math.inf  # when to show something

    def _start(self, trainer: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
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
            self._next = 0.0

    def _show(self, module: Any, done: int) -> None:
        now = time.monotonic()
        if now < self._next and not (self._bar is not None and done >= self.total):
            return
        note = "  ".join(f"{name} {float(value):.4g}" for name, value in module.shown.items())
        if self._bar is not None:
            self._next = now + SECONDS_BETWEEN_LOOKS
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        else:
            self._next = now + SECONDS_BETWEEN_LINES
            log.info("%s: %d/%d  %s", self.title, done, self.total, note)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        self._start(trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self._show(module, trainer.global_step)

    def on_train_end(self, *args: Any) -> None:
        self._stop()

    def on_test_start(self, trainer: Any, *args: Any) -> None:
        self._start(trainer)

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._show(module, batch_idx + 1)

    def on_test_end(self, *args: Any) -> None:
        self._stop()

    def on_exception(self, *args: Any) -> None:
        self._stop()
