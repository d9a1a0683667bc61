"""From result files to tables.

Rows share a table when everything in `Group` agrees: task, data set and its hashes, preset, regime, host
model and its weights, training tokens, test examples, tuning budget and the task's numerics version. Of an
attention in several numerics versions the newest is in the table; each older one makes a table of its own.

Within a table a row is an attention's label, recipe and settings, and its runs differ in their seeds alone.
Settings that differ between rows stand in a column of their own, so nothing is averaged over them and nothing
hides. A tuned learning rate is no setting: the validation split chose it.

Where a profile (`hhbench profile --task` or `--model`) of the same task or host lies beside the results, from the same
device and in the same precision, its speed stands in the rows too: that of one profile, the newest.

A task that says so gets one more table, the average over its data sets, from the seeds that have all of them.
"""

import csv
import dataclasses
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from hhbench.errors import unknown_name
from hhbench.result import Result, key_of

if TYPE_CHECKING:
    from hhbench.profile.record import Profile

AVERAGE: Final = "average"

# Settings that tell no rows of a table apart: a row's name says them, or `Group` does, or they are seeds.
_NAMED_ELSEWHERE = frozenset(
    ("task", "dataset", "preset", "regime", "model", "attn", "option", "recipe", "seed", "teacher_seed")
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What the rows of a table have in common. In an average, what its data sets don't share is None.

    Attributes:
        weights, data: a hash: the file's own where there is one file, or else one of all names and hashes.
            Weights are None where the host starts from random ones.
        train_tokens: that the regime trains on.
        tuning_trials: learning rates that were tried; 0 = untuned.
        older_attention: "name version" where a newer version of that attention is in the main table, or "".
    """

    task: str
    dataset: str
    preset: str
    regime: str
    model: str | None
    weights: str | None
    data: str | None
    train_tokens: int | None
    test_examples: int | None
    tuning_trials: int
    task_version: int
    metric: str
    higher_is_better: bool
    older_attention: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Where time and memory were measured. Numbers from two such places are never put side by side."""

    device: str
    world_size: int
    threads: int
    precision: str
    length: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attention: means over `n` seeds, and the sample standard deviation of the score.

    What no run has is None. `settings` are those in which the table's rows differ. `parts` are the means per
    data set: one, or an average's. What begins with `profiled` is of a profile, at its length nearest to the table's:
    tokens a second of a training step, that as a multiple of softmax's, and milliseconds of one decoded token.
    """

    attention: str
    recipe: str | None
    settings: str
    attention_version: int
    has_weights: bool
    score_mean: float
    score_std: float | None
    n: int
    teacher: float | None
    after_swap: float | None
    after_transfer: float | None
    percent_of_teacher: float | None
    kl_before: float | None
    kl_after: float | None
    params_added: int
    tokens_per_s: float | None
    peak_memory_mb: float | None
    state_bytes: int | None
    keys: tuple[str, ...]
    parts: tuple[float, ...]
    profiled_tokens_per_s: float | None = None
    profiled_times_softmax: float | None = None
    profiled_token_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that may be compared, best first.

    Attributes:
        title: task, data set, preset and regime, and what sets it apart from tables that share these.
        lines: the conditions, and what a reader must know about rows and columns that are not there.
        measured: None where the rows' time and memory can't be compared, and are left out.
        parts: the headings of an average's data sets; empty in every other table.
        keys: of every result that belongs here, also of those that a newer one of the same seed replaced.
    """

    title: str
    lines: tuple[str, ...]
    group: Group
    measured: Measured | None
    rows: tuple[Row, ...]
    parts: tuple[str, ...]
    keys: frozenset[str]


def percent_of_teacher(scores: Sequence[float], teachers: Sequence[float], *, higher_is_better: bool) -> float | None:
    """How much of the teacher is left: 100 x mean(scores) / mean(teachers), as the Hedgehog paper has it.

    Where lower is better (perplexity) the fraction is turned around, so that 100 is the teacher's own level
    and less is worse in both. None where there is no teacher, or the divisor is 0.
    """
    if not scores or not teachers:
        return None
    part, whole = fmean(scores), fmean(teachers)
    if not higher_is_better:
        part, whole = whole, part
    return 100 * part / whole if whole else None


def tables(results: Iterable[Result], profiles: Sequence["Profile"] = ()) -> list[Table]:
    """Every table that the results make. Neither the order of the results nor that of their files matters.

    A key counts once, however often its file was copied.

    Args:
        profiles: the newest first; see `hhbench.profile.record.find`.
    """
    newest = {r.key: r for r in sorted(results, key=_age)}
    # From old to new again, so that the newest run of a seed counts, and the newest wording names a data set.
    ordered = sorted(newest.values(), key=_age)
    groups = _grouped(ordered)
    averages = _averaged(groups)
    apart = _telling_apart([*groups, *(group for group, _ in averages)])
    made = [_data_set_table(group, members, apart[group]) for group, members in groups.items()]
    made = [_with_profile(table, profiles) for table in made]
    made += [_average_table(group, suite, candidates, apart[group]) for (group, suite), candidates in averages.items()]
    places = {(r.task["name"], name): i for r in ordered for i, name in enumerate(r.task["suite"])}
    return sorted(made, key=lambda table: _place(table.group, places))


def table_of(result: Result, results: Iterable[Result]) -> Table:
    """The one table that a result belongs to, among all results: what a finished run shows."""
    return next(t for t in tables([*results, result]) if result.key in t.keys and t.group.dataset != AVERAGE)


def render(tables: Sequence[Table], format: str = "md") -> str:
    """Tables as text that ends in a newline. The same tables give the same bytes.

    Args:
        format: "md" for people; "csv" for programs: one flat table with a line for each row, machine names,
            and numbers in full.

    Raises:
        UsageError: there is no such format.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    return FORMATS[format](tables)


# From results to rows


ItemT = TypeVar("ItemT")
KeyT = TypeVar("KeyT")


def _by(key: Callable[[ItemT], KeyT], items: Iterable[ItemT]) -> dict[KeyT, list[ItemT]]:
    found: defaultdict[KeyT, list[ItemT]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def _age(result: Result) -> tuple[str, str]:
    return result.created, json.dumps(result.as_dict(), sort_keys=True)


def _grouped(results: Iterable[Result]) -> dict[Group, list[Result]]:
    """The results of each table; each older version of an attention is told apart from the newest."""
    found: dict[Group, list[Result]] = {}
    for group, members in _by(_group, results).items():
        versions = _by(lambda r: r.identity["attention"]["name"], members)
        newest = {name: max(r.identity["attention"]["version"] for r in own) for name, own in versions.items()}
        for result in members:
            name, version = result.identity["attention"]["name"], result.identity["attention"]["version"]
            older = "" if version == newest[name] else f"{name} {version}"
            found.setdefault(dataclasses.replace(group, older_attention=older), []).append(result)
    return found


def _group(result: Result) -> Group:
    settings = result.identity["settings"]
    return Group(
        task=result.task["name"],
        dataset=result.task["dataset"],
        preset=settings["preset"],
        regime=settings["regime"],
        model=settings["model"],
        weights=_digest(result.identity["weights"]),
        data=_digest(result.identity["data"]),
        train_tokens=result.task["train_tokens"],
        test_examples=result.score.num_examples,
        tuning_trials=len(result.tuning["trials"]) if result.tuning else 0,
        task_version=result.identity["task"]["version"],
        metric=result.score.name,
        higher_is_better=result.score.higher_is_better,
        older_attention="",
    )


def _tokens_per_s(result: Result) -> float | None:
    """Of training or finetuning alone: a transfer stage, which runs few backward passes, would flatter its row."""
    seconds = result.cost["seconds"].get("train")
    trials = len(result.tuning["trials"]) if result.tuning else 1
    return result.task["train_tokens"] * trials / seconds if seconds else None


def _digest(hashes: Mapping[str, str]) -> str | None:
    return next(iter(hashes.values())) if len(hashes) == 1 else key_of(hashes) if hashes else None


def _settings(result: Result) -> dict[str, Any]:
    """What tells rows of one label and recipe apart."""
    left_out = _NAMED_ELSEWHERE | ({"lr"} if result.tuning else set())
    settings = {name: v for name, v in result.identity["settings"].items() if name not in left_out}
    source = result.identity["attention"]["source_sha256"]
    return settings | ({"source": source[:8]} if source else {})


def _name(result: Result) -> tuple[str, str]:
    return result.attention["label"], result.attention["recipe"] or ""


def _entries(results: Iterable[Result]) -> list[list[Result]]:
    """The results of each row of a table."""
    return list(_by(lambda r: (_name(r), json.dumps(_settings(r), sort_keys=True)), results).values())


def _by_seed(entry: Iterable[Result]) -> dict[tuple[int, int], Result]:
    """One result for each seed, the newest. Where there is no teacher, its seed changes nothing."""
    settings = ((r, r.identity["settings"]) for r in entry)
    found = {(s["seed"], s["teacher_seed"] if r.teacher else 0): r for r, s in settings}
    return dict(sorted(found.items()))


def _row(units: Sequence[Sequence[Result]], *, settings: str, measured: bool) -> Row:
    """A row from one unit for each seed: one result, or one of each data set in an average."""

    def of_units(read: Callable[[Result], float | None]) -> list[float]:
        values = ([v for r in unit if (v := read(r)) is not None] for unit in units)
        return [fmean(own) for own, unit in zip(values, units, strict=True) if len(own) == len(unit)]

    def mean(read: Callable[[Result], float | None]) -> float | None:
        own = of_units(read)
        return fmean(own) if own else None

    def kl(r: Result, moment: Literal["kl_before", "kl_after"]) -> float | None:
        layers = r.fidelity[moment] if r.fidelity else []
        return fmean(layers) if layers else None

    first = units[0][0]
    scores = of_units(lambda r: r.score.value)
    teachers = of_units(lambda r: r.teacher["score"] if r.teacher else None)
    return Row(
        attention=first.attention["label"],
        recipe=first.attention["recipe"],
        settings=settings,
        attention_version=first.identity["attention"]["version"],
        has_weights=first.attention["has_weights"],
        score_mean=fmean(scores),
        score_std=stdev(scores) if len(scores) > 1 else None,
        n=len(units),
        teacher=fmean(teachers) if teachers else None,
        after_swap=mean(lambda r: r.after_swap),
        after_transfer=mean(lambda r: r.after_transfer),
        percent_of_teacher=percent_of_teacher(
            of_units(lambda r: r.score.value if r.teacher else None),
            teachers,
            higher_is_better=first.score.higher_is_better,
        ),
        kl_before=mean(lambda r: kl(r, "kl_before")),
        kl_after=mean(lambda r: kl(r, "kl_after")),
        params_added=first.attention["params_added"],
        tokens_per_s=mean(_tokens_per_s) if measured else None,
        peak_memory_mb=mean(lambda r: r.cost["peak_memory_mb"]) if measured else None,
        state_bytes=first.cost["state_bytes"] if measured else None,
        keys=tuple(r.key for unit in units for r in unit),
        parts=tuple(fmean(r.score.value for r in results) for results in zip(*units, strict=True)),
    )


# From rows to tables


def _data_set_table(group: Group, members: Sequence[Result], apart: str) -> Table:
    entries = _entries(members)
    settings = [_settings(entry[0]) for entry in entries]
    names = sorted({name for own in settings for name in own})
    varied = [name for name in names if len({json.dumps(own.get(name)) for own in settings}) > 1]
    runs = [_by_seed(entry) for entry in entries]
    places = {_measured(r) for own in runs for r in own.values()}
    lines = [_conditions(group, members), *_one_teacher(group, runs), *_replacement(members)]
    rows = []
    for entry, own, chosen in zip(entries, settings, runs, strict=True):
        text = ", ".join(f"{name}={_plain(own[name])}" for name in varied if name in own)
        rows.append(_row([[r] for r in chosen.values()], settings=text, measured=len(places) == 1))
        if len(chosen) < len(entry):
            several = f"{len(entry)} results for {counted(len(chosen), 'seed')} with the same settings"
            lines.append(f"{_shown(_name(entry[0]))}: {several}; the newest of each seed counts.")
    if len(places) > 1:
        differ = [f for f in _fields(Measured) if len({getattr(place, f) for place in places}) > 1]
        values = (f"{f} ({', '.join(sorted({str(getattr(place, f)) for place in places}))})" for f in differ)
        lines.append(f"Time and memory are left out: the runs differ in {', '.join(values)}.")
    measured = places.pop() if len(places) == 1 else None
    if measured:
        lines.append(f"Time and memory: {_shown_place(measured)}.")
    return Table(
        title=_title(group, members[-1].task["title"], apart),
        lines=(lines[0], *sorted(lines[1:])),
        group=group,
        measured=measured,
        rows=_best_first(rows, group),
        parts=(),
        keys=frozenset(r.key for r in members),
    )


def _with_profile(table: Table, profiles: Sequence["Profile"]) -> Table:
    """The table with the speed that a profile measured: of the same subject, device and precision, and of one alone."""
    if table.measured is None:
        return table  # several machines: no profile is of them all
    dtype = _DTYPES.get(table.measured.precision)
    for profile in profiles:
        if profile.device != table.measured.device or not _is_of(profile, table.group):
            continue
        length = min(profile.ordered("length"), key=lambda n: abs(n - table.measured.length))  # type: ignore[union-attr]
        rows = tuple(_profiled(row, profile, str(dtype), length) for row in table.rows)
        if rows == table.rows:
            continue
        place = profile.environment
        line = (
            f"Profiled: {place['device']}, {counted(place['threads'], 'thread')}, {dtype}, length {length:,}, "
            f"batch {profile.settings['batch_size'] or 'of the task'}, {profile.clock}; {profile.created[:10]}."
        )
        return dataclasses.replace(table, rows=rows, lines=(*table.lines, line))
    return table


_DTYPES: Final = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}


def _is_of(profile: "Profile", group: Group) -> bool:
    """Whether a profile is of a table's task with its host and data set, or of its host alone."""
    facts = profile.subject["facts"]
    if profile.settings["subject"] == "task":
        known = profile.settings["task"], facts.get("host"), facts.get("dataset")
        return known == (group.task, group.model, group.dataset)
    return bool(profile.settings.get("model") == group.model)


def _profiled(row: Row, profile: "Profile", dtype: str, length: int) -> Row:
    """A row with what a profile says of its attention, in the version that the row has."""
    step, token = (profile.find(row.attention, work, dtype, length) for work in ("train", "token"))
    step, token = (cell if cell and cell.version == row.attention_version else None for cell in (step, token))
    softmax = profile.find("softmax", "train", dtype, length)
    return dataclasses.replace(
        row,
        profiled_tokens_per_s=step.tokens_per_s if step else None,
        profiled_times_softmax=softmax.p50 / step.p50 if step and softmax and softmax.p50 and step.p50 else None,
        profiled_token_ms=1000 * token.p50 if token and token.p50 else None,
    )


# The rows of each data set that an average may take, by what one row of the average has in common.
_Candidates = dict[tuple[str, str, int, str], dict[str, list[list[Result]]]]


def _averaged(groups: Mapping[Group, list[Result]]) -> dict[tuple[Group, tuple[str, ...]], _Candidates]:
    """What an average is made of, for each suite of which some attention has all data sets.

    Older versions of an attention stay out.
    """
    found: dict[tuple[Group, tuple[str, ...]], _Candidates] = {}
    for group, members in groups.items():
        if group.older_attention:
            continue
        shared = dataclasses.replace(
            group, dataset=AVERAGE, data=None, train_tokens=None, test_examples=None, metric=AVERAGE
        )
        for entry in _entries(members):
            first = entry[0]
            if first.task["average"] and len(first.task["suite"]) > 1:
                identity = first.identity["attention"]
                name = (*_name(first), identity["version"], identity["source_sha256"] or "")
                candidates = found.setdefault((shared, tuple(first.task["suite"])), {})
                candidates.setdefault(name, {}).setdefault(group.dataset, []).append(entry)
    return {
        (group, suite): candidates
        for (group, suite), candidates in found.items()
        if any(entries.keys() >= set(suite) for entries in candidates.values())
    }


def _average_table(group: Group, suite: tuple[str, ...], candidates: _Candidates, apart: str) -> Table:
    """The average over a suite, and why some attentions have none."""
    rows: list[Row] = []
    notes: list[str] = []
    used: list[Result] = []
    averaged: list[list[tuple[int, int]]] = []
    for name, entries in sorted(candidates.items()):
        missing = [dataset for dataset in suite if dataset not in entries]
        twice = [dataset for dataset in suite if len(entries.get(dataset, ())) > 1]
        if missing or twice:
            reasons = [f"no {dataset}" for dataset in missing] + [f"more than one row of {d}" for d in twice]
            notes.append(f"Not averaged: {_shown(name)}, which has {', '.join(reasons)}.")
            continue
        by_seed = [_by_seed(entries[dataset][0]) for dataset in suite]
        seeds = sorted(set.intersection(*(set(runs) for runs in by_seed)))
        if not seeds:
            notes.append(f"Not averaged: {_shown(name)}, which has no seed with all data sets.")
            continue
        averaged.append(seeds)
        units = [[runs[seed] for runs in by_seed] for seed in seeds]
        rows.append(_row(units, settings="", measured=False))
        used += [r for unit in units for r in unit]
    named = {r.task["dataset"]: f"{r.task['title']} {r.score.name}" for r in used}
    return Table(
        title=_title(group, None, apart),
        lines=(
            _conditions(group, used),
            "Each seed's mean over the data sets; the spread is over seeds.",
            *_one_teacher(group, averaged),
            *_replacement(used),
            *notes,
        ),
        group=group,
        measured=None,
        rows=_best_first(rows, group),
        parts=tuple(named[dataset] for dataset in suite if dataset in named),
        keys=frozenset(r.key for r in used),
    )


def _best_first(rows: Iterable[Row], group: Group) -> tuple[Row, ...]:
    sign = -1 if group.higher_is_better else 1
    return tuple(sorted(rows, key=lambda r: (sign * r.score_mean, r.attention, r.recipe or "", r.settings, r.keys)))


def _place(group: Group, places: Mapping[tuple[str, str], int]) -> tuple[Any, ...]:
    """Tables of one task, preset and regime together: data sets in the suite's order, then the average."""
    heading = (group.task, group.preset, group.regime, group.dataset == AVERAGE)
    within = places.get((group.task, group.dataset), len(places))
    return (*heading, within, *map(str, dataclasses.astuple(group)))


def _measured(result: Result) -> Measured:
    place = result.environment
    return Measured(
        device=place["device"],
        world_size=place["world_size"],
        threads=place["threads"],
        precision=place["precision"],
        length=result.cost["length"],
    )


# Words


def counted(number: int, noun: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _phrases(group: Group) -> dict[str, str]:
    """Each condition of a group in words, by its field's name."""
    trials = group.tuning_trials
    phrases = {
        "model": f"host {group.model}",
        "weights": f"weights {group.weights[:8]}" if group.weights else "from random weights",
        "train_tokens": "" if group.train_tokens is None else counted(group.train_tokens, "training token"),
        "test_examples": "" if group.test_examples is None else counted(group.test_examples, "test example"),
        "data": f"data {group.data[:8]}" if group.data else "",
        "tuning_trials": f"best of {counted(trials, 'learning rate')} by validation" if trials else "untuned",
        "task_version": f"{group.task} version {group.task_version}",
        "metric": f"{group.metric}, {'higher' if group.higher_is_better else 'lower'} is better",
        "older_attention": f"older version: {group.older_attention}" if group.older_attention else "",
    }
    return {field: phrase for field, phrase in phrases.items() if phrase}


def _telling_apart(groups: Sequence[Group]) -> dict[Group, str]:
    """For each group the conditions in which it differs from those that share its heading."""
    apart: dict[Group, str] = {}
    for own in _by(lambda g: (g.task, g.dataset, g.preset, g.regime), groups).values():
        said = {group: _phrases(group) for group in own}
        fields = [f for f in _fields(Group) if len({phrases.get(f) for phrases in said.values()}) > 1]
        apart |= {group: ", ".join(phrases[f] for f in fields if f in phrases) for group, phrases in said.items()}
    return apart


def _title(group: Group, data_set: str | None, apart: str) -> str:
    subject = f"{group.task} / {data_set}" if data_set else f"{group.task} {AVERAGE}"
    return f"{subject} ({group.preset}, {group.regime})" + (f": {apart}" if apart else "")


def _conditions(group: Group, results: Sequence[Result]) -> str:
    attentions = (r.identity["attention"] for r in results)
    versions = sorted({f"{a['name']} {a['version']}" for a in attentions})
    said = [text for field, text in _phrases(group).items() if field not in ("task_version", "metric")]
    text = ", ".join([*said, f"versions: {', '.join([f'{group.task} {group.task_version}', *versions])}"])
    days = sorted({r.created[:10] for r in results})
    ran = f" Run {' to '.join(dict.fromkeys((days[0], days[-1])))}." if days else ""
    return f"{text[0].upper()}{text[1:]}.{ran}"


def _one_teacher(group: Group, rows: Iterable[Collection[tuple[int, int]]]) -> list[str]:
    """What a reader must know of a spread in which every run began from the same teacher that was trained here.

    Args:
        rows: the seeds of each row, each with its teacher's.
    """
    teachers = [{teacher for _, teacher in seeds} for seeds in rows if len(seeds) > 1]
    if group.regime != "finetuned-conversion" or not any(len(own) == 1 for own in teachers):
        return []
    return ["±: where a row's seeds share one teacher, what another one would change is not in it (--teacher-seed)."]


def _replacement(results: Iterable[Result]) -> list[str]:
    """What a reader must know of mixers in a pretrained model."""
    if not any(r.attention["recipe"] == "replacement" for r in results):
        return []
    return ["replacement: the whole attention block is new, projections included, and was taught nothing before."]


def _shown(name: tuple[Any, ...]) -> str:
    label, recipe = name[:2]
    return f"{label} ({recipe})" if recipe else label


def _shown_place(place: Measured) -> str:
    machine = f"{place.device}, {counted(place.threads, 'thread')}"
    if place.world_size > 1:
        machine += f", {place.world_size} processes"
    return f"{machine}, {place.precision}, length {place.length:,}"


def _fields(record: type) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


# Formats


@dataclass(frozen=True)
class _Column:
    """A column for people."""

    heading: str
    cells: tuple[str, ...]
    is_number: bool


def _columns(table: Table) -> list[_Column]:
    """The columns of a table for people, in order. One in which no row has a value is left out."""
    columns: list[_Column] = []
    digits = 3 if max((abs(row.score_mean) for row in table.rows), default=0.0) < 10 else 2
    arrow = "↑" if table.group.higher_is_better else "↓"
    any_kl = any(row.kl_before is not None or row.kl_after is not None for row in table.rows)

    def add(
        heading: str, cell: Callable[[Row], str | None], *, missing: str = "not run", is_number: bool = True
    ) -> None:
        cells = [cell(row) for row in table.rows]
        if any(text is not None for text in cells):
            shown = tuple(missing if text is None else text for text in cells)
            columns.append(_Column(heading, shown, is_number))

    def number(value: float | None, form: str) -> str | None:
        if value is None:
            return None
        text = format(value, form)
        return text.lstrip("-") if float(text.replace(",", "")) == 0 else text  # rounding left -0.000 of a KL of 0

    def with_spread(row: Row) -> str:
        spread = "" if row.score_std is None else f" ± {row.score_std:.{digits}f}"
        return f"{row.score_mean:.{digits}f}{spread} (n={row.n})"

    def kl(row: Row) -> str | None:
        if any_kl and not row.has_weights:
            return "no weights"
        if row.kl_before is None and row.kl_after is None:
            return None
        return " → ".join(number(value, ".3f") or "not run" for value in (row.kl_before, row.kl_after))

    def of_part(part: int) -> Callable[[Row], str | None]:
        return lambda row: number(row.parts[part], score)

    score = f".{digits}f"
    add("attention", lambda row: row.attention, is_number=False)
    add("recipe", lambda row: row.recipe, is_number=False)
    add("settings", lambda row: row.settings or None, missing="", is_number=False)
    for part, heading in enumerate(table.parts):
        add(f"{heading} {arrow}", of_part(part))
    add(f"{table.group.metric} {arrow}", with_spread)
    add("teacher", lambda row: number(row.teacher, score))
    add("after swap", lambda row: number(row.after_swap, score))
    add("after transfer", lambda row: number(row.after_transfer, score))
    add("% of teacher", lambda row: number(row.percent_of_teacher, ".1f"))
    add("KL before → after", kl)
    add("params added", lambda row: number(row.params_added, ",.0f"))
    add("tokens/s", lambda row: number(row.tokens_per_s, ",.0f"))
    add("peak memory (MB)", lambda row: number(row.peak_memory_mb, ",.0f"))
    add("state (bytes)", lambda row: number(row.state_bytes, ",.0f"), missing="none")
    add("profiled tokens/s", lambda row: number(row.profiled_tokens_per_s, ",.0f"))
    add("x softmax", lambda row: number(row.profiled_times_softmax, ".2f"))
    add("ms/token", lambda row: number(row.profiled_token_ms, ".3g"))
    return columns


def _markdown(tables: Sequence[Table]) -> str:
    return "\n".join(map(_markdown_table, tables)) or "No results.\n"


def _markdown_table(table: Table) -> str:
    """A Markdown table that is also aligned as plain text, for the terminal."""
    text = "\n".join([f"### {_one_line(table.title)}", "", *map(_one_line, table.lines), ""])
    columns = _columns(table)
    if not columns:
        return text
    padded: list[list[str]] = []
    for column in columns:
        cells = [_one_line(cell) for cell in (column.heading, *column.cells)]
        width = max(map(len, cells))
        heading, *values = [cell.rjust(width) if column.is_number else cell.ljust(width) for cell in cells]
        padded.append([heading, "-" * (width - 1) + (":" if column.is_number else "-"), *values])
    lines = [f"| {' | '.join(cells)} |" for cells in zip(*padded, strict=True)]
    return "\n".join([text, *lines, ""])


# What a name could do in Markdown: end a cell, open a tag, an entity or code, link or show something from elsewhere.
_ACTIVE = re.compile(r"[\\|<&`]|(?<=\])(?=[(\[:])|(?<=!)(?=\[)")


def _one_line(text: str) -> str:
    """Names are the user's own or a stranger's and may hold anything: here they are text and nothing else."""
    shown = "".join(c if c.isprintable() else " " for c in text)  # a terminal obeys control characters
    return " ".join(_ACTIVE.sub(r"\\\g<0>", shown).split())


def _csv(tables: Sequence[Table]) -> str:
    row_fields = [name for name in _fields(Row) if name != "parts"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_fields(Group), *row_fields, *_fields(Measured)])
    for table in tables:
        group = [_plain(value) for value in dataclasses.astuple(table.group)]
        place = [_plain(getattr(table.measured, name, None)) for name in _fields(Measured)]
        for row in table.rows:
            writer.writerow([*group, *(_plain(getattr(row, name)) for name in row_fields), *place])
    return text.getvalue()


def _plain(value: Any) -> str:
    """A value as a program reads it back: floats in full, lists apart by blanks, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return f"'{text}" if isinstance(value, str) and text.startswith(("=", "+", "-", "@")) else text  # no formula


FORMATS: Final[Mapping[str, Callable[[Sequence[Table]], str]]] = {"md": _markdown, "csv": _csv}
