"""Being told to stop: a cluster's signal is noted, and heeded where all ranks can save a checkpoint together.

No signal interrupts a step. Slurm is asked to start the job again unless it is ending it: SIGUSR1 comes when the time
is nearly over or another job wants the nodes; SIGTERM where a cluster sends no signal of the job's own, and when a step
alone is ended.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

from hhbench.errors import HHBenchError
from hhbench.ranks import largest_over_ranks, requeue
from hhbench.result import TOLD

CODE: Final = 75  # exit code: stopped, run it again. BSD's sysexits call it a temporary failure.
SIGNALS: Final = (signal.SIGUSR1, signal.SIGTERM)
# What ranks can want at the end of a step. The largest over ranks is what all do.
NOTHING, SAVE, END, AGAIN = range(4)

_received: set[int] = set()


class Stopped(HHBenchError):  # noqa: N818  # it is no error
    """A signal ended the run where it can go on. `again`: a cluster was told that it is to be started again."""

    exit_code = CODE

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    _received.add(number)


def heed() -> None:
    """Note the signals from here on. Libraries install handlers of their own: this is said again after them."""
    if threading.current_thread() is threading.main_thread():  # Python lets no other one
        for number in SIGNALS:
            signal.signal(number, _note)


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """Note the signals inside, and forget them after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heed()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def noted() -> int:
    """What this process was told: AGAIN, END or NOTHING. SIGTERM starts a trial of `hhbench submit` again, and nobody
    else's job: that may have more steps than this one.
    """
    if not _received:
        return NOTHING
    return AGAIN if signal.SIGUSR1 in _received or TOLD in os.environ else END


def stop(told: float, where: str) -> None:
    """End here if any rank was told to.

    Args:
        told: the largest of the ranks' `noted`.
        where: what is kept, for the message.

    Raises:
        Stopped: it was. Asked to start again, Slurm has been told to, unless it is ending the job.
    """
    if told >= END:
        _received.clear()
        again = told == AGAIN and requeue()
        raise Stopped(f"stopped by a signal {where}" + ("; Slurm starts it again" if again else ""), again=again)


def stop_between_stages(where: str) -> None:
    """`stop`, where every rank passes at the same time."""
    stop(largest_over_ranks(noted()), where)
