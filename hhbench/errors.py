"""What hhbench tells a user who asked for something that cannot be: one clear line that says what to do."""

import difflib
from collections.abc import Iterable


class HHBenchError(Exception):
    """A run failed for a reason that the user can act on. The command line prints the message and exits `exit_code`."""

    exit_code = 1


class UsageError(HHBenchError, ValueError):
    """The request itself is wrong: an unknown name, an impossible option. The command line exits 2."""

    exit_code = 2


class DataError(HHBenchError):
    """Data or weights are missing, corrupted or unreadable. The message names the command that fetches them."""


def in_one_line(error: BaseException) -> str:
    """What somebody else's exception says, with its type, without its line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that nobody has, with the nearest one that somebody does."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"no {kind} named {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
