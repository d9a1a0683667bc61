"""How much faster is hhbench's Hedgehog than other people's linear attention here? All in one run, in the same rounds.

python scripts/bench_peers.py                       the peers that are installed; the others' rows say how to get them
python scripts/bench_peers.py --install peers       install and build them in the folder peers first (some minutes)
python scripts/bench_peers.py --install peers --compile     and hhbench's own forward through torch.compile
python scripts/bench_peers.py --install peers --publish     and put the table into docs/performance.md

Each peer gets Hedgehog's features from plain torch, and its time includes them, as hhbench's does; its outputs are
compared with hhbench's before its time is taken. Batch 1, 12 heads of 64, one thread, CPU time of the thread. A ratio
is the peer's time divided by that of hhbench's usual form. The last line of stdout is one JSON document. Exits 1 if a
peer disagrees.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from bench import (
    CLOCK,
    Effort,
    Row,
    chosen,
    effort_of,
    finish,
    guarded,
    hedgehog,
    hedgehog_features,
    inference,
    parser,
    qkv,
    ratio_row,
    record,
    say,
    settings_of,
    softmax,
    training,
)
from torch import Tensor

from hhbench import native
from hhbench.errors import HHBenchError, in_one_line
from hhbench.kernels import kernels
from hhbench.profile.correctness import distance

FAST_TRANSFORMERS = "pytorch-fast-transformers==0.4.0"
PERFORMER = "performer-pytorch==1.1.4"
FLA = "flash-linear-attention==0.6.0"
# What --install takes: --no-deps keeps another torch out, so that what they need besides is named.
PACKAGES = (
    PERFORMER,
    "local-attention==1.9.15",
    "axial-positional-embedding==0.3.12",
    "fla-core==0.6.0",
    "einops==0.8.2",
)
BUILDS = {"own": "", "native": "-O3 -march=native"}  # the flags besides fast-transformers' and Python's own
# Builds the one extension that is called here, by the package's own setup.py: all seven take a quarter of an hour.
BUILD = """
import sys, setuptools
setup = setuptools.setup
def only_causal_product(**arguments):
    wanted = [each for each in arguments["ext_modules"] if each.name.endswith("causal_product_cpu")]
    return setup(**{**arguments, "ext_modules": wanted})
setuptools.setup = only_causal_product
sys.argv, sys.path = ["setup.py", "build_ext", "--inplace"], [".", *sys.path]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__name__": "__main__"})
"""
AGREE = 1e-4  # of the largest output
CELLS = (("forward", 4096), ("backward", 2048), ("backward", 4096))
GOALS = {
    ("fast-transformers", "forward", 4096): 3.3,
    ("fast-transformers-native", "forward", 4096): 2.1,
    ("fast-transformers-native", "backward", 2048): 1.7,
    ("fla-naive-chunk", "forward", 4096): 3.2,
    ("fla-naive-chunk", "backward", 4096): 2.3,
}

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mapped queries and keys [B, H, N, F] and values [B, H, N, E] in, normalised outputs [B, H, N, E] out."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to the same outputs.

    Attributes:
        what: a table's words for it.
        load: imports it, from the folder of --install if there is one.
        get: what to do where it is absent.
        longest_backward: its backward pass at longer sequences is left out, for the memory that it takes.
    """

    what: str
    load: Callable[[Path | None], Kernel]
    get: str
    longest_backward: int | None = None


class AbsentError(HHBenchError):
    """The peer isn't installed."""


def imported(name: str) -> ModuleType:
    """The module, or AbsentError if its package isn't there at all."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise AbsentError(f"no module {name}") from error
        raise


def performer_pytorch(folder: Path | None) -> Kernel:
    kernel: Kernel = imported("performer_pytorch.performer_pytorch").causal_linear_attention_noncuda
    return kernel


def naive_chunk(folder: Path | None) -> Kernel:
    kernel = imported("fla.ops.linear_attn.naive").naive_chunk_linear_attn

    def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = kernel(*tokens_first, scale=1.0, normalize=True)
        return out.transpose(1, 2)

    return normalised


def fast_transformers(folder: Path | None, build: str) -> Kernel:
    """Its kernel, and the normaliser as its CausalLinearAttention has it."""
    if folder is None and build != "own":
        raise AbsentError("an installed package has one build")
    package = "fast_transformers" if folder is None else f"fast_transformers_{build}"
    kernel = imported(f"{package}.causal_product").causal_dot_product

    def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        denominator = torch.einsum("bhnf,bhnf->bhn", q, k.cumsum(-2)) + 1e-6
        out: Tensor = kernel(q, k, v) / denominator[..., None]
        return out

    return normalised


PEERS = {
    "fast-transformers": Peer(
        "fast-transformers' kernel, its own flags",
        lambda folder: fast_transformers(folder, "own"),
        f"pip install --no-build-isolation {FAST_TRANSFORMERS} (needs a C++ compiler)",
    ),
    "fast-transformers-native": Peer(
        f"fast-transformers' kernel, {BUILDS['native']}",
        lambda folder: fast_transformers(folder, "native"),
        "--install DIR builds it (needs a C++ compiler)",
    ),
    "fla-naive-chunk": Peer("flash-linear-attention's naive_chunk_linear_attn", naive_chunk, f"pip install {FLA}"),
    "performer-pytorch": Peer(
        "performer-pytorch's causal_linear_attention_noncuda",
        performer_pytorch,
        f"pip install {PERFORMER}",
        longest_backward=2048,
    ),
}
WORDS = {
    "sdpa": "torch's scaled_dot_product_attention",
    **{name: peer.what for name, peer in PEERS.items()},
    "native": "hhbench's own compiled form",
    "compiled": "hhbench through torch.compile",
}


def install(folder: Path) -> None:
    """Bring every peer into the folder, and build what has to be built; what is there already stays.

    Raises:
        HHBenchError: pip failed. A build that failed is said on stderr, and its row says what is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = folder / "packages"
    if not packages.is_dir():
        say(f"installing {', '.join(PACKAGES)} ...")
        _pip("install", "--target", str(packages), *PACKAGES)
    sys.path.insert(0, str(packages))
    if compiler() is None:
        say("no C++ compiler: fast-transformers is not built")
        return
    missing = [name for name in BUILDS if not (packages / f"fast_transformers_{name}").is_dir()]
    if missing:
        _pip("download", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder), FAST_TRANSFORMERS)
    for name in missing:
        say(f"building fast-transformers ({name} flags), about a minute ...")
        build(folder, name)


def build(folder: Path, name: str) -> None:
    """Unpack the source package, build its kernel in place, and put the package under the build's own name.

    A second extension of the same full name would not load: Python gets the module of the first.
    """
    aside = folder / f"building-{name}"
    shutil.rmtree(aside, ignore_errors=True)
    (archive,) = folder.glob("*fast*transformers*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(aside, filter="data")
    (inside,) = aside.iterdir()
    # A variable takes the place of the flags that Python was built with: without them there is no -O.
    variables = {"MAX_JOBS": "1"} | os.environ
    for variable in ("CFLAGS", "CXXFLAGS"):
        variables.pop(variable, None)
        if BUILDS[name]:
            variables[variable] = f"{sysconfig.get_config_var('CFLAGS') or ''} {BUILDS[name]}"
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=inside, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        say(f"fast-transformers was not built: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    else:
        (inside / "fast_transformers").rename(folder / "packages" / f"fast_transformers_{name}")
    shutil.rmtree(aside)


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HHBenchError(f"pip {command} failed: {done.stderr.strip().splitlines()[-1]}")


def compiler() -> str | None:
    """The C++ compiler that torch would call."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


@dataclass(frozen=True)
class Contenders:
    """Who takes part, hhbench among them, and why the others don't."""

    attend: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]
    weights: Sequence[Tensor]
    notes: dict[str, str]

    @property
    def disagree(self) -> bool:
        return any(note.startswith("disagrees") for note in self.notes.values())


def contenders(names: Sequence[str], args: argparse.Namespace) -> Contenders:
    """Load each and compare it with hhbench on a short sequence."""
    ours = hedgehog()
    weights = list(ours.parameters())
    attend: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"hhbench": ours}
    notes: dict[str, str] = {}
    inputs = qkv(min(512, args.max_length or 512))
    for name in names:
        try:
            if name == "sdpa":
                attend[name] = softmax
                continue
            if name == "compiled":
                if not args.compile:
                    notes[name] = "not run: add --compile"
                    continue
                if compiler() is None:
                    notes[name] = "not run: no C++ compiler"
                    continue
                found = torch.compile(ours)
            elif name == "native":
                if native.library() is None:
                    notes[name] = "not run: no C compiler"
                    continue
                found = by_native(ours)
            else:
                found = with_features(PEERS[name].load(args.install), weights)
            with torch.no_grad():
                out, truth = found(*inputs), ours(*inputs)
            error = distance(out, truth)
        except AbsentError:
            notes[name] = f"not installed: {PEERS[name].get}"
        except Exception as problem:  # whatever somebody else's code raises is that row's business only
            notes[name] = f"failed: {in_one_line(problem)}"
        else:
            if error <= AGREE:
                attend[name] = found
            else:
                notes[name] = f"disagrees with hhbench by {error:.1e} of the maximum"
    return Contenders(attend, weights, notes)


def by_native(attend: Kernel) -> Kernel:
    """The same, asked for its compiled form."""

    def asked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        os.environ["HHBENCH_NATIVE"] = "1"
        try:
            with kernels() as seen:
                out = attend(q, k, v)
        finally:
            del os.environ["HHBENCH_NATIVE"]
        if set(seen) != {"native"}:
            raise HHBenchError(f"not served by the compiled form, but by {', '.join(seen)}")
        return out

    return asked


def with_features(kernel: Kernel, weights: Sequence[Tensor]) -> Kernel:
    """The kernel after Hedgehog's map in plain torch."""
    query_weight, key_weight = weights

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(hedgehog_features(q, query_weight), hedgehog_features(k, key_weight), v)

    return attend


def cell(found: Contenders, names: Sequence[str], passes: str, length: int, effort: Effort) -> list[Row]:
    """All contenders in the same rounds, forward or forward and backward, at one length."""
    N = effort.length(length)
    backward = passes == "backward"
    notes = dict(found.notes)
    for name in names:
        longest = PEERS[name].longest_backward if name in PEERS else None
        if backward and longest is not None and longest < N:
            notes.setdefault(name, f"not run above {longest:,} tokens: it keeps a sum for each token")
    if backward and "compiled" in found.attend:
        notes["compiled"] = "forward only"
    inputs = qkv(N)
    calls = {}
    for name, attend in found.attend.items():
        if name not in notes:
            weights = () if name == "sdpa" else found.weights
            calls[name] = training(attend, inputs, weights) if backward else inference(attend, inputs)
    with kernels() as seen:
        calls["hhbench"]()
    samples = CLOCK.interleaved(calls, effort.rounds)
    rows = []
    for name in names:
        key, what = f"{name}-{passes}-{length}", f"{'forward + backward' if backward else 'forward'}, {N:,} tokens: "
        if name in samples:
            row = ratio_row(key, what + WORDS[name], samples, of=name, to="hhbench", length=N, ran=sorted(seen))
        else:
            row = Row(key, what + WORDS[name], None, note=notes[name])
        goal = GOALS.get((name, passes, length))
        rows.append(row if goal is None else row.towards(goal, applies=length == N))
    return rows


def main() -> int:
    names = list(WORDS)
    arguments = parser(__doc__, names)
    arguments.add_argument("--install", type=Path, metavar="DIR", help="install the peers into this folder and use it")
    arguments.add_argument("--compile", action="store_true", help="torch.compile of hhbench's forward as well: slow")
    args = arguments.parse_args()
    effort = effort_of(args)
    picked = chosen(args.rows, names, "peer")
    os.environ.pop("HHBENCH_NATIVE", None)  # the form that has to be asked for is a row of its own
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.install:
        install(args.install.resolve())
    found = contenders(picked, args)
    for name, note in found.notes.items():
        say(f"{name}: {note}")
    rows = []
    for passes, length in CELLS:
        say(f"{passes}, {effort.length(length):,} tokens ...")
        for row in cell(found, picked, passes, length, effort):
            say(f"  {row.what}: {row.note if row.value is None else format(row.value, '.3g')}")
            rows.append(row)
    finish(record("bench_peers", rows, **settings_of(effort), packages=[*PACKAGES, FAST_TRANSFORMERS]), args, "peers")
    return 1 if found.disagree else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
