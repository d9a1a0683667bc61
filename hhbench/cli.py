"""`hhbench`: finds the command that was asked for and answers what goes wrong in one line."""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from hhbench import __version__, stopping
from hhbench.errors import HHBenchError

log = logging.getLogger("hhbench")

# In the order of --help. Each is a module of hhbench.commands; a dash of its name is an underscore there.
COMMANDS = (
    "run",
    "sweep",
    "submit",
    "status",
    "cancel",
    "collect",
    "convert",
    "list",
    "show",
    "leaderboard",
    "submit-result",
    "check",
    "fidelity",
    "profile",
    "generate",
    "data",
    "doctor",
    "new",
)

EXAMPLES = """examples:
  python -m hhbench run --task glue --attn hedgehog      the main job: train, convert, test, tabulate
  hhbench list attentions                                what can be compared
  hhbench leaderboard                                    every result so far, as tables
  hhbench <command> --help                               a command's options, with examples"""


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest name for a misspelt option or command."""

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        wrong = ""
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ", 1)[1].split()[0].split("=")[0]
        elif "invalid choice: " in message:
            wrong = message.split("invalid choice: ", 1)[1].split("'")[1]
            known = [name for action in self._actions for name in (action.choices or ())]
        close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5) if wrong else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        self.exit(2, f"{self.prog}: {message}.{hint} See {self.prog} --help.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # The command's own parser knows the options that were meant.
            commands = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            commands.choices[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a cluster's signal, 130 interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if args.debug else logging.INFO)
    try:
        code: int = args.call(args)
        return code
    except KeyboardInterrupt:
        print(f"\nhhbench: interrupted. {args.interrupted}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: hhbench leaderboard | head
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # Python flushes stdout once more at exit
        return 1
    except Exception as error:
        if args.debug and getattr(error, "exit_code", 1) != stopping.CODE:
            raise
        if isinstance(error, HHBenchError):
            print(f"hhbench: {error}", file=sys.stderr)
            return error.exit_code
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(
            f"hhbench: {type(error).__name__}: {first} (run again with --debug for the trace)",
            file=sys.stderr,
        )
        return 1


def _parser() -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="hhbench",
        description="A benchmark suite for attention: train, convert and profile Hedgehog and its rivals.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"hhbench {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name in COMMANDS:
        command = import_module(f"hhbench.commands.{name.replace('-', '_')}")
        sub = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=command.EXAMPLES, formatter_class=raw
        )
        sub.set_defaults(call=command.call, interrupted="")
        sub.add_argument("--debug", action="store_true", help="show the trace of an error")
        command.add_arguments(sub)
    return parser
