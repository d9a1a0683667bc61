"""Being told to stop: a signal is noted, and heeded where all ranks can save a checkpoint together.

No signal interrupts a step, but a second Ctrl-C. Slurm is asked to start the job again unless it is ending it: SIGUSR1
comes when the time is nearly over or another job wants the nodes; SIGTERM where a cluster sends no signal of the job's
own, and when a step alone is ended.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

from hhbench.errors import HHBenchError
from hhbench.ranks import largest_over_ranks, launched, requeue, requeue_this_job
from hhbench.result import TOLD

log = logging.getLogger("hhbench")

CODE: Final = 75  # exit code: stopped, run it again. BSD's sysexits call it a temporary failure.
SIGNALS: Final = (signal.SIGUSR1, signal.SIGTERM)
# What ranks can want at the end of a step. The largest over ranks is what all do.
NOTHING, SAVE, INTERRUPT, END, AGAIN = range(5)
# A variable: the seconds that a cluster gives between its signal and the end. In half of them a step is to end.
NOTICE: Final = "HHBENCH_SIGNAL_SECONDS"
USUAL_NOTICE: Final = 120

PR_SET_PDEATHSIG: Final = 1
LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None

_received: set[int] = set()
_patience: threading.Timer | None = None


class Stopped(HHBenchError):  # noqa: N818  # it is no error
    """A signal ended the run where it can go on. `again`: a cluster was told that it is to be started again."""

    exit_code = CODE

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


def _note(number: int, frame: FrameType | None) -> None:
    global _patience
    del frame
    _received.add(number)
    # Validation, a test or a fetch may outlast the cluster's notice. What a checkpoint holds goes on all the same.
    if noted() == AGAIN and _patience is None and (who := launched()).by == "Slurm" and who.rank == 0:
        _patience = threading.Timer(patience(), requeue_this_job)
        _patience.daemon = True
        _patience.start()


def patience() -> float:
    """The seconds in which a step is to end."""
    return float(os.environ.get(NOTICE, USUAL_NOTICE)) / 2


def _note_interrupt(number: int, frame: FrameType | None) -> None:
    if number in _received:
        signal.default_int_handler(number, frame)
    _received.add(number)
    log.warning("stopping after this step, or validation; Ctrl-C again: at once, to go on from the last checkpoint")


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
        _forget()


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Inside, the first Ctrl-C waits for the end of a step: in the midst of one, weights, counts and buffers are of
    different steps.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores it
    )
    if ours:
        signal.signal(signal.SIGINT, _note_interrupt)
    try:
        yield
    except BaseException:
        _received.discard(signal.SIGINT)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with(parent: int) -> None:
    """In a child: when its parent is killed, it is told to stop. Linux alone can do it."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed just now
            os._exit(CODE)


def outlive_signals() -> None:
    """In a process that loads data: the run finishes its step when it is told to stop, and needs batches for that.
    Terminals, torchrun and Slurm tell all of a run's processes; what ends a loader is the word of its parent.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # a signal's sender isn't known elsewhere
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _forget() -> None:
    global _patience
    if _patience is not None:
        _patience.cancel()
    _patience = None
    _received.clear()


def noted() -> int:
    """What this process was told: AGAIN, END, INTERRUPT or NOTHING. SIGTERM starts a trial of `hhbench submit` again,
    and nobody else's job: that may have more steps than this one.
    """
    if not _received:
        return NOTHING
    if _received == {signal.SIGINT}:
        return INTERRUPT
    return AGAIN if signal.SIGUSR1 in _received or TOLD in os.environ else END


def stop(told: float, where: str) -> None:
    """End here if any rank was told to.

    Args:
        told: the largest of the ranks' `noted`.
        where: what is kept, for the message.

    Raises:
        Stopped: it was. Asked to start again, Slurm has been told to, unless it is ending the job.
        KeyboardInterrupt: by Ctrl-C.
    """
    if told >= INTERRUPT:
        _forget()
        if told == INTERRUPT:
            raise KeyboardInterrupt
        again = told == AGAIN and requeue()
        raise Stopped(f"stopped by a signal {where}" + ("; Slurm starts it again" if again else ""), again=again)


def stop_between_stages(where: str) -> None:
    """`stop`, where every rank passes at the same time."""
    stop(largest_over_ranks(noted()), where)
