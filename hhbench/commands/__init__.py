"""The commands, one module each: arguments in, one call out. `hhbench new` is new.py, and so on.

A command has:

    HELP: str                                               # what it does, in one line
    EXAMPLES: str                                           # what its --help ends with
    def add_arguments(parser: argparse.ArgumentParser)      # all but what every command has, as --debug
    def call(args: argparse.Namespace) -> int               # the exit code

and its name in COMMANDS of hhbench/cli.py. As `hhbench --help` imports every one of them, nothing heavy is imported
before `call` needs it. A command that keeps what is done when it is interrupted says so by
`parser.set_defaults(interrupted="...")`.
"""
