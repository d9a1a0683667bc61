"""A profile for a person: tables, and the line that each attention comes down to."""

from collections.abc import Sequence
from dataclasses import dataclass

from hhbench.profile.against import TOLERANCE, Comparison
from hhbench.profile.record import Cell, Profile
from hhbench.profile.request import SOFTMAX

Table = tuple[Sequence[str], list[list[str]]]
HEADINGS = {
    "train": "Training step of {subject}",
    "prefill": "Prefill of {subject}: forward, without gradients",
    "token": "Decoding with {subject}",
}


@dataclass(frozen=True)
class Section:
    """A heading and a table."""

    heading: str
    headers: Sequence[str]
    rows: list[list[str]]


def sections(profile: Profile) -> list[Section]:
    """The tables: one for each mode and precision, one row for each attention and length; then the summary."""
    found = []
    subject = {"layer": "a layer", "model": "the model", "task": "the task"}[profile.settings["subject"]]
    for dtype in profile.ordered("dtype"):
        for work, heading in HEADINGS.items():
            cells = [cell for cell in profile.cells if cell.work == work and cell.dtype == dtype]
            if cells:
                headers, rows = (_decoding if work == "token" else _passes)(profile, cells)
                found.append(Section(f"{heading.format(subject=subject)} ({dtype})", *_filled(headers, rows)))
        if profile.crossovers:
            heading = f"From which length on faster than the fastest softmax ({dtype}; 95 % between)"
            found.append(Section(heading, *_summary(profile, dtype)))
    return found


def lines(profile: Profile) -> list[str]:
    """What stands before the tables: the conditions under which they hold."""
    place = profile.environment
    threads = f", {place['threads']} thread{'s' * (place['threads'] > 1)}"
    said = [
        profile.subject["title"],
        f"{place['device']}{threads}, torch {place['versions'].get('torch', '?')}; "
        f"time is {profile.clock}; memory is {profile.memory}",
    ]
    for ceiling in profile.ceilings:
        said.append(
            f"ceiling in {ceiling.dtype}: {ceiling.flops_per_s / 1e9:,.0f} GFLOP/s, by {len(ceiling.seconds)} products "
            f"of {ceiling.size} x {ceiling.size} matrices between the cells; MFU is stated FLOPs a second as a part"
        )
    return said


def _filled(headers: Sequence[str], rows: list[list[str]]) -> Table:
    """Without the columns in which no row has anything."""
    kept = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    return [headers[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _passes(profile: Profile, cells: list[Cell]) -> Table:
    headers = (
        "attention", "tokens", "ms (p10 to p90)", "rounds", "tokens/s", "x softmax", "memory (MB)", "GFLOP", "counted",
        "MFU", "ran", "note",
    )  # fmt: skip
    rows = []
    for cell in cells:
        start = [cell.attention, f"{cell.length:,}"]
        if not cell.measured:
            rows.append([*start, cell.status, *[""] * (len(headers) - 4), cell.note])
            continue
        rows.append(
            [
                *start,
                _spread(cell, 1e3),
                str(len(cell.seconds)),
                _rate(cell),
                _times(profile, cell),
                _mega(cell.peak_bytes),
                _scaled(cell.flops, 1e9),
                _scaled(cell.counted_flops, 1e9),
                _percent(cell.mfu),
                _kernels(cell),
                cell.note,
            ]
        )
    return headers, rows


def _decoding(profile: Profile, cells: list[Cell]) -> Table:
    headers = (
        "attention", "after tokens", "ms to the first", "µs a token (p10 to p90)", "rounds", "tokens/s", "x softmax",
        "state (kB)", "memory (MB)", "MFLOP", "counted", "MFU", "ran", "note",
    )  # fmt: skip
    rows = []
    for cell in cells:
        first = profile.find(cell.attention, "first token", cell.dtype, cell.length)
        said = "" if first is None else _spread(first, 1e3, short=True) if first.measured else first.status
        start = [cell.attention, f"{cell.length:,}", said]
        if not cell.measured:
            rows.append([*start, cell.status, *[""] * (len(headers) - 5), cell.note])
            continue
        rows.append(
            [
                *start,
                _spread(cell, 1e6),
                str(len(cell.seconds)),
                _rate(cell),
                _times(profile, cell),
                "no state" if cell.state_bytes is None else f"{cell.state_bytes / 1e3:,.0f}",
                _mega(cell.peak_bytes),
                _scaled(cell.flops, 1e6),
                _scaled(cell.counted_flops, 1e6),
                _percent(cell.mfu),
                _kernels(cell),
                cell.note,
            ]
        )
    return headers, rows


def _summary(profile: Profile, dtype: str) -> Table:
    works = [w for w in ("train", "prefill", "first token", "token") if any(c.work == w for c in profile.crossovers)]
    headers = ["attention", *(f"{work}: from, x at the longest" for work in works), "state"]
    rows = []
    for label in profile.ordered("attention"):
        own = {c.work: c for c in profile.crossovers if (c.attention, c.dtype) == (label, dtype)}
        if not own:
            continue
        row = [label]
        for work in works:
            found = own.get(work)
            against = "" if found is None or found.against == SOFTMAX else f", {found.against}"
            row.append("" if found is None else f"{found.said}; x{found.speedup:.3g} at {found.last:,}{against}")
        states = {c.length: c.state_bytes for c in profile.cells if c.attention == label and c.measured}
        sizes = {size for size in states.values() if size is not None}
        row.append("none" if not sizes else f"{min(sizes) / 1e3:,.0f} kB" if len(sizes) == 1 else "grows")
        rows.append(row)
    return headers, rows


def comparison_lines(comparison: Comparison) -> list[str]:
    """What `--against` found: every regression, or the cell that came nearest to one."""
    said = list(comparison.lines)
    for change in comparison.regressions:
        cell = change.cell
        times = "" if change.ratio is None else f", {change.ratio:.2f} times the time by its yardstick"
        said.append(f"REGRESSION: {cell.attention} {cell.work} {cell.dtype} at {cell.length:,}: {change.why}{times}")
    timed = [change for change in comparison.changes if change.low is not None]
    if timed and not comparison.regressions:
        worst = max(timed, key=lambda change: change.low or 0.0)
        cell = worst.cell
        said.append(
            f"no regression; nearest to one: {cell.attention} {cell.work} {cell.dtype} at {cell.length:,}, "
            f"{worst.ratio:.2f} times the time, {worst.low:.2f} at least; more than {1 + TOLERANCE:.2f} would be one"
        )
    return said


def fastest_softmax(profile: Profile, cell: Cell) -> Cell | None:
    """The softmax that a cell is compared with: the fastest at the same place."""
    there = [
        other
        for other in profile.cells
        if other.measured
        and (other.work, other.dtype, other.length) == (cell.work, cell.dtype, cell.length)
        and other.attention.split(" by ")[0] == SOFTMAX
    ]
    return min(there, key=lambda other: other.p50 or 0.0, default=None)


def speedup(profile: Profile, cell: Cell) -> float | None:
    """The fastest softmax's time over a cell's; None where one of them has none."""
    other = fastest_softmax(profile, cell)
    return other.p50 / cell.p50 if other is not None and other.p50 and cell.p50 else None


def _times(profile: Profile, cell: Cell) -> str:
    times = speedup(profile, cell)
    return "" if times is None else f"{times:.3g}"


def _spread(cell: Cell, scale: float, *, short: bool = False) -> str:
    p10, p50, p90 = (scale * (value or 0.0) for value in (cell.p10, cell.p50, cell.p90))
    mark = " ~" if cell.noisy else ""
    return f"{_three(p50)}{mark}" if short else f"{_three(p50)} ({_three(p10)} to {_three(p90)}){mark}"


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rate(cell: Cell) -> str:
    return f"{cell.tokens_per_s:,.0f}" if cell.tokens_per_s is not None else ""


def _mega(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"


def _scaled(flops: int | None, unit: float) -> str:
    return "not stated" if flops is None else _three(flops / unit)


def _kernels(cell: Cell) -> str:
    """What ran, torch's own names cut short."""
    return ", ".join(name.replace("scaled_dot_product_", "sdpa ").replace("_attention", "") for name in cell.kernels)


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.1%}"
