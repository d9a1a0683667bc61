"""Result: the record of one run, complete enough to read, compare and rerun it, in one JSON file.

A file is a result if it is named `result.json` or ends in `.result.json`, wherever it lies. Nothing here
imports torch: two hundred results are read in a moment.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import types
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from hhbench.errors import HHBenchError, UsageError

SCHEMA: Final = 1
ABSENT: Final = "(absent)"
FILE_NAME: Final = "result.json"
# A variable that names a file. Whoever starts a run finds the path of its result there at the end, or a line in
# FILE.failed or FILE.stopped beside it, and removes what is there of an earlier start.
TOLD: Final = "HHBENCH_RESULT_PATH"

_PACKAGES = (
    "hhbench",
    "torch",
    "lightning",
    "transformers",
    "timm",
    "torchmetrics",
    "datasets",
    "numpy",
    "flash-attn",
    "fla-core",
)
_CODE = ("hhbench", "tasks", "baselines")


class AttentionIdentity(TypedDict):
    """`source_sha256` is the hash of a user's own file; None for hhbench's own, which go by version."""

    name: str
    version: int
    source_sha256: str | None


class TaskIdentity(TypedDict):
    name: str
    version: int


class Identity(TypedDict):
    """All that the key hashes.

    `settings` are `RunConfig.identity()`; `data` and `weights` map a name, the same on every machine, to its
    sha256.
    """

    settings: dict[str, Any]
    data: dict[str, str]
    weights: dict[str, str]
    attention: AttentionIdentity
    task: TaskIdentity


class AttentionInfo(TypedDict):
    """`recipe` is None in the scratch regime; `params_added` is what the attention adds to the whole host."""

    name: str
    label: str
    recipe: str | None
    params_added: int
    has_weights: bool


class TaskInfo(TypedDict):
    """`suite` holds all data sets of the task's preset, in order; `average`: whether their mean is a score.

    `title` is what a table calls the data set. `train_tokens` is what the regime's stages train on by the
    settings: the same for every attention and recipe.
    """

    name: str
    dataset: str
    suite: list[str]
    train_tokens: int
    title: str
    average: bool


class Teacher(TypedDict):
    key: str
    score: float


class Fidelity(TypedDict):
    """KL from softmax's weights to the attention's, and entropies, in nats: one number per layer.

    A list is empty where its moment did not come: nothing after a transfer that did not run.
    """

    kl_before: list[float]
    kl_after: list[float]
    teacher_entropy: list[float]
    student_entropy_before: list[float]
    student_entropy_after: list[float]
    floored_rows: int


class LayerChoice(TypedDict):
    """Which layers `--keep-layers auto` kept as softmax, in the order of choice.

    `scores` are those with 0, 1, 2 ... of them kept; None where there was none to measure.
    """

    layers: list[int]
    scores: list[float | None]


class Trial(TypedDict):
    """`validation` is the score on the validation split, which picks; the test split never does."""

    lr: float
    validation: float


class Tuning(TypedDict):
    trials: list[Trial]
    picked: float


class Cost(TypedDict):
    """Seconds by stage, tokens per second of training, memory in MB, and the state of decoding in bytes.

    `train_tokens` and `train_tokens_per_s` are of all stages together. `length`, in tokens, is where speed, memory and
    state were measured. `state_bytes` is None where decoding is not recurrent.
    """

    params: int
    params_added: int
    train_tokens: int
    seconds: dict[str, float]
    train_tokens_per_s: float
    peak_memory_mb: float
    state_bytes: int | None
    length: int


class Environment(TypedDict):
    """`commit` and `dirty` are of hhbench's own checkout, None outside one. `device` is the device's name."""

    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    device: str
    world_size: int
    threads: int
    precision: str
    platform: str
    python: str


@dataclass(frozen=True)
class Score:
    """The number that a table shows, on `num_examples` test examples."""

    name: str
    value: float
    higher_is_better: bool
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        key: `key_of(identity)`.
        created: when it ended, UTC, ISO 8601.
        config: `RunConfig.as_dict()` with nothing blank.
        metrics: every metric on the test split, the score among them.
        teacher: the model that was converted; None in scratch.
        after_swap: the score right after the swap, before any training.
        after_transfer: the score after attention transfer, before finetuning.
        tuning: None where the learning rate was not tuned.
        layer_choice: None where the layers to keep were not chosen automatically.
    """

    schema: int
    key: str
    created: str
    config: dict[str, Any]
    identity: Identity
    attention: AttentionInfo
    task: TaskInfo
    score: Score
    metrics: dict[str, float]
    teacher: Teacher | None
    after_swap: float | None
    after_transfer: float | None
    fidelity: Fidelity | None
    tuning: Tuning | None
    cost: Cost
    environment: Environment
    layer_choice: LayerChoice | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def as_json(self) -> bytes:
        """What a file holds. Raises ValueError if a number is not finite."""
        return (json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_dict(cls, values: Any) -> "Result":
        """From plain JSON values, every field checked.

        Raises:
            HHBenchError: another schema, a missing, unknown, mistyped or non-finite field, or a key that is
                not the identity's. The message is the reason alone.
        """
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if schema != SCHEMA:
            raise HHBenchError(f"its schema is {schema!r}; this hhbench reads schema {SCHEMA}")
        result: Result = checked(values, cls, "")
        for name, kind in _GROUPING_SETTINGS.items():
            if name not in result.identity["settings"]:
                raise HHBenchError(f"identity.settings.{name} is missing")
            checked(result.identity["settings"][name], kind, f"identity.settings.{name}")
        if (key := key_of(result.identity)) != result.key:
            raise HHBenchError(
                f"its key {result.key} is not its identity's, {key}: it was changed after it was written"
            )
        return result


# The settings that a table can't do without. RunConfig owns the others.
_GROUPING_SETTINGS: Mapping[str, Any] = {
    "preset": str,
    "regime": str,
    "model": str | None,
    "seed": int,
    "teacher_seed": int,
}


def key_of(identity: Mapping[str, Any]) -> str:
    """16 hex characters: the same for the same values, in whatever order they stand."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def safe_name(text: str, *, most: int = 250, ascii: bool = True) -> str:
    """A text as a file's name: a label may hold slashes and brackets, and no name leads out of its folder.

    Args:
        most: characters of it.
        ascii: whether letters are those of ASCII alone.
    """
    return re.sub(r"[^\w.=,+-]|^\.+", "_", text, flags=re.ASCII if ascii else re.NOFLAG)[:most] or "_"


def diff_identity(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Which parts of two identities differ, as (dotted path, value in a, value in b), sorted by path.

    A value that one of them lacks is `ABSENT`.
    """
    differences: list[tuple[str, Any, Any]] = []
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name, ABSENT), b.get(name, ABSENT)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            differences += [(f"{name}.{path}", *values) for path, *values in diff_identity(x, y)]
        elif x != y:
            differences.append((name, x, y))
    return differences


def save(result: Result, folder: Path) -> Path:
    """Write `result.json` into a folder, whole or not at all, and return its path.

    Raises:
        HHBenchError: the record is not fit to be read again (a score that is not finite), or the folder can't
            be written.
    """
    path = folder / FILE_NAME
    try:
        content = Result.from_dict(result.as_dict()).as_json()
    except (HHBenchError, TypeError, ValueError) as error:
        raise HHBenchError(f"can't save {path}: {error}") from error
    return write(path, content)


def write(path: Path, content: bytes) -> Path:
    """Write a record, whole or not at all, and return its path.

    Raises:
        HHBenchError: it can't be written.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise HHBenchError(f"can't write {path}: {error.strerror or error}") from error
    return path


def load(path: Path) -> Result:
    """Read one result file.

    Raises:
        HHBenchError: it can't be read, is cut short, has another schema, or a field is wrong. File and reason
            are named.
    """
    try:
        return Result.from_dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json))
    except OSError as error:
        raise HHBenchError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise HHBenchError(f"{path}: not whole JSON ({error})") from error
    except HHBenchError as error:
        raise HHBenchError(f"{path}: {error}") from error


def files(folder: Path, unreadable: Callable[[OSError], None] | None = None) -> list[Path]:
    """Every file below a folder that is a result by its name, in the order of their paths; none without a folder.

    Folders may come and go meanwhile.
    """
    return sorted(
        Path(root, name)
        for root, _, names in os.walk(folder, onerror=unreadable)
        for name in names
        if name == FILE_NAME or name.endswith(f".{FILE_NAME}")
    )


def find(folder: Path) -> tuple[list[Result], list[str]]:
    """Every result below a folder in the order of their paths, and a line for each file that was skipped.

    Raises:
        HHBenchError: there is no such folder.
    """
    if not folder.is_dir():
        raise HHBenchError(f"no folder {folder}: no results to read")
    results: list[Result] = []
    skipped: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), f"skipped {error.filename}: {error.strerror}"))

    for path in files(folder, unreadable):
        try:
            results.append(load(path))
        except HHBenchError as error:
            skipped.append((path, f"skipped {error}"))
    return results, [line for _, line in sorted(skipped)]


def find_by_prefix(folder: Path, text: str) -> Result:
    """The result that a user means by a path (a file, or a run's folder) or by the start of its key.

    Raises:
        UsageError: no result or more than one is meant.
        HHBenchError: the file can't be read, or there is no such folder.
    """
    for path in (Path(text), Path(text) / FILE_NAME):
        if path.is_file():
            return load(path)
    by_key = {result.key: result for result in find(folder)[0]}
    keys = sorted(key for key in by_key if key.startswith(text))
    if len(keys) == 1:
        return by_key[keys[0]]
    if keys:
        raise UsageError(f"{text!r} begins {len(keys)} keys below {folder}: {', '.join(keys[:5])} ...")
    close = difflib.get_close_matches(text, [key[: len(text)] for key in sorted(by_key)], n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(
        f"no result {text!r}: neither a file nor the start of one of {len(by_key)} keys below {folder}.{hint}"
    )


def environment(*, device: str, world_size: int, threads: int, precision: str) -> Environment:
    """What a run ran on. The caller knows the device's name, processes, CPU threads and precision."""
    commit, dirty = _checkout()
    return Environment(
        commit=commit,
        dirty=dirty,
        versions=_versions(),
        device=device,
        world_size=world_size,
        threads=threads,
        precision=precision,
        platform=platform.platform(),
        python=platform.python_version(),
    )


def cpu_name() -> str:
    """What this machine's CPU calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _checkout() -> tuple[str | None, bool | None]:
    """The commit of hhbench's checkout, and whether the code differs from it."""
    root = Path(__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed hhbench may lie in an environment inside some other repository, whose commit says nothing.
    if top is None or Path(top).resolve() != root:
        return None, None
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *_CODE)
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    # Inside a hook, GIT_DIR and its kin point at the repository that runs the hook.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env=variables,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_hints = functools.cache(get_type_hints)


def checked(value: Any, kind: Any, path: str) -> Any:
    """A JSON value as what a type hint of a record says, or an HHBenchError that names the field.

    Args:
        kind: a dataclass, a TypedDict, or what their fields may be.
        path: of the value in the whole, by dots; empty for the whole.
    """
    if kind is Any:
        return value
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        fields = _hints(kind)
        found = _of_type(value, dict, "an object", path)
        for name in sorted(fields.keys() ^ found.keys()):
            if not hasattr(kind, name):  # a field with a default is newer than some records
                raise HHBenchError(f"{_join(path, name)} is {'missing' if name in fields else 'an unknown field'}")
        return kind(**{n: checked(found[n], hint, _join(path, n)) for n, hint in fields.items() if n in found})
    if get_origin(kind) is types.UnionType:  # the only unions here are X | None
        return None if value is None else checked(value, get_args(kind)[0], path)
    if get_origin(kind) is list:
        items = _of_type(value, list, "a list", path)
        return [checked(item, get_args(kind)[0], f"{path}[{i}]") for i, item in enumerate(items)]
    if get_origin(kind) is dict:
        found = _of_type(value, dict, "an object", path)
        return {name: checked(item, get_args(kind)[1], _join(path, name)) for name, item in found.items()}
    if kind is float:
        try:
            number = float(_of_type(value, (int, float), "a number", path))
        except OverflowError:  # JSON's integers have no end
            number = math.inf
        if not math.isfinite(number):
            raise HHBenchError(f"{path} is {number}, which is no finite number")
        return number
    return _of_type(value, kind, {int: "an integer", bool: "true or false", str: "text"}[kind], path)


def _of_type(value: Any, kind: type | tuple[type, ...], words: str, path: str) -> Any:
    # To Python a bool is an int; to a reader of the file it is not.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise HHBenchError(f"{path or 'the record'} must be {words}, not {value!r}")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
