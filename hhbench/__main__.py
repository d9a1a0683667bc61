"""`python -m hhbench`."""

import signal
import sys
from pathlib import Path

import hhbench

if hhbench.__file__ is None:  # a folder of that name, such as a clone's, lies where this was started, and came first
    shadows = {Path(folder).parent for folder in hhbench.__path__}
    sys.path[:] = [folder for folder in sys.path if Path(folder).absolute() not in shadows]
    del sys.modules["hhbench"]

from hhbench.cli import main
from hhbench.stopping import SIGNALS

if __name__ == "__main__":
    code = main()
    for number in SIGNALS:  # what is done is done: leaving takes a moment, and must not end as a failure
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
