"""hhbench check: the conformance checks of an attention, as a table."""

import argparse
import time

from hhbench.commands.shown import calm_libraries, literal, print_table, watched
from hhbench.config import options_of

HELP = "whether an attention is what it says it is: PASS, FAIL or SKIP for each check"
EXAMPLES = """examples:
  hhbench check hedgehog                             every check, in both directions; exits 1 if one fails
  hhbench check my_attn.py:MyAttention               your own attention
  hhbench check hedgehog --option activation=exp --direction causal
  hhbench check performer --long                     also at 65,536 tokens
  hhbench check my_attn.py:MyAttention --only padding,future-value
  hhbench check taylor --json > taylor.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a name, file.py:Class or a dotted path")
    parser.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the attention (repeatable)")
    parser.add_argument("--direction", choices=("causal", "bidirectional"), help="default: every one that it serves")
    parser.add_argument("--only", metavar="CHECKS", help="these checks, by the names in the table's first column")
    parser.add_argument("--long", action="store_true", help="add the long sequences")
    parser.add_argument("--json", action="store_true", help="one JSON document in place of the table")


def call(args: argparse.Namespace) -> int:
    from hhbench import check as checks
    from hhbench.attention import ATTENTIONS

    spec = ATTENTIONS.get(args.name)
    options = options_of(args.option or ())
    calm_libraries()
    start = time.monotonic()
    with watched(spec.name) as watch:
        findings = checks.check(
            spec,
            options=options,
            directions=[args.direction] if args.direction else None,
            long=args.long,
            only=args.only.split(",") if args.only else None,
            watch=watch,
        )
    failed = sum(f.status == "FAIL" for f in findings)
    if args.json:
        print(checks.as_json(spec, options, findings))
        return 1 if failed else 0
    styles = {"PASS": "green", "FAIL": "bold red", "SKIP": "dim"}

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2g}"

    print_table(
        ("check", "direction", "result", "measured", "bound", "what it asserts (where it came nearest to its bound)"),
        (
            (
                f.check,
                f.direction,
                f"[{styles[f.status]}]{f.status}[/]",
                number(f.measured),
                number(f.bound),
                literal(f.title + (f" ({f.note})" if f.note else "")),
            )
            for f in findings
        ),
    )
    passed, skipped = (sum(f.status == status for f in findings) for status in ("PASS", "SKIP"))
    print(f"\n{spec.label(options)}: {passed} passed, {failed} failed, {skipped} skipped in", end=" ")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if failed else 0
