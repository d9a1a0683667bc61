"""The bench scripts run at tiny sizes and end with their record; the published tables are those of the records.

Nothing that was timed is asserted: only what must hold on any machine.
"""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hhbench.profile.correctness import distance
from hhbench.profile.record import Crossover

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
try:
    import bench
    import bench_goals
    import bench_peers
finally:
    sys.path.pop(0)


def run(script: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    """The record that a script prints last."""
    command = [sys.executable, f"scripts/{script}.py", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == status, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def rows_of(found: dict[str, Any]) -> dict[str, bench.Row]:
    return {values["name"]: bench.Row(**values) for values in found["rows"]}


def test_the_training_script_trains_beside_a_bare_loop_that_does_the_same() -> None:
    found = run("bench_training", "--task", "imagenet", "--rounds", "2")  # the digits need no download
    (row,) = rows_of(found).values()
    assert row.value is not None and row.low is not None and row.high is not None
    assert 0 < row.low <= row.value <= row.high
    assert row.rounds == 2
    assert row.reached == (row.value >= 0.95)
    mine, theirs = row.details["losses"]
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert found["environment"]["threads"] == 1


def test_the_forms_script_has_a_row_for_each_length_order_and_pass_and_says_what_is_taken() -> None:
    found = run("bench_forms", "--attn", "elu", "--lengths", "8,256", "--rounds", "2")
    rows = rows_of(found)
    orders, passes = ("causal", "bidirectional"), ("forward", "forward + backward")
    assert list(rows) == [f"elu {order} {way} {N}" for order in orders for way in passes for N in (8, 256)]
    assert all(row.value is not None and row.value > 0 for row in rows.values())
    assert {row.note for name, row in rows.items() if name.endswith(" 8")} == {"takes all pairs"}
    assert {row.note for name, row in rows.items() if name.endswith(" 256")} == {"takes blocks"}


def test_the_transfer_script_has_a_row_for_both_losses_at_each_length() -> None:
    found = run("bench_transfer", "--model", "gpt2", "--lengths", "16,128", "--tokens", "32", "--rounds", "1")
    rows = rows_of(found)
    assert list(rows) == ["whole 16", "sampled 16", "whole 128", "sampled 128"]
    assert all(row.value is not None and row.value > 0 and "memory" in row.note for row in rows.values())
    assert [row.goal for row in rows.values()] == [None, None, 2.0, None]


def test_the_goals_script_measures_every_row(tmp_path: Path) -> None:
    found = run("bench_goals", "--max-length", "64", "--rounds", "1", "--json", str(tmp_path / "goals.json"))
    assert json.loads((tmp_path / "goals.json").read_text()) == found
    rows = rows_of(found)
    assert {"forward", "backward", "bf16", "decode-1024", "decode-32768", "bidirectional", "memory"} <= rows.keys()
    assert {"crossover-forward", "crossover-backward", "forward-taylor", "forward-elu"} <= rows.keys()
    assert {name.removesuffix("-compiled") for name in rows if name.endswith("-compiled")} <= rows.keys()
    for name, row in rows.items():
        ran = row.details.get("ran", [])
        if name.endswith("-compiled") and "not served by the compiled form" not in row.note:
            assert ran == [kernel for kernel in ran if kernel.startswith("native")] != []
        else:
            assert "native" not in ran
        assert row.value is None or row.value > 0
        # At other lengths than the goals' nothing was reached and nothing was missed.
        assert row.reached is None
        assert row.value is not None or row.note
    assert rows["forward"].goal == 40
    assert rows["crossover-forward"].at_most
    assert rows["error-outputs"].value < 3e-7
    assert rows["error-gradients"].value < 5e-6
    assert rows["error-bf16"].value < 1e-2
    for work in ("prefill", "train"):
        details = rows[f"profile-crossover-{work}"].details
        assert details["profile"]["first"] == 16
        assert details["profile"]["last"] == 64
        assert details["agree"] in (True, False)
    assert found["environment"]["threads"] == 1
    assert found["environment"]["device"] == bench.machine()


def test_the_peers_script_goes_on_without_the_peers(tmp_path: Path) -> None:
    picked = "sdpa,performer-pytorch,fast-transformers-native,native"
    found = run("bench_peers", "--max-length", "64", "--rounds", "2", "--rows", picked)
    rows = rows_of(found)
    assert len(rows) == 4 * len(bench_peers.CELLS)
    compiled = rows["native-backward-4096"]
    assert compiled.value is not None or "no C compiler" in compiled.note
    assert rows["sdpa-forward-4096"].value > 0
    for name, row in rows.items():
        if name.startswith("fast-transformers-native"):
            assert row.value is None
            assert "--install DIR" in row.note


@pytest.mark.slow
@pytest.mark.network
def test_the_peers_install_and_agree(tmp_path: Path) -> None:
    if bench_peers.compiler() is None:
        pytest.skip("needs a C++ compiler")
    found = run("bench_peers", "--max-length", "64", "--rounds", "2", "--install", str(tmp_path / "peers"))
    notes = {row.note for row in rows_of(found).values() if row.value is None}
    assert notes == {"not run: add --compile", "forward only"} & notes


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("bench_goals", ["--rows", "decod"], "Did you mean 'decode'?"),
        ("bench_peers", ["--rows", "sdpaa"], "Did you mean 'sdpa'?"),
        ("bench_forms", ["--attn", "hedgehgo"], "Did you mean 'hedgehog'?"),
        ("bench_forms", ["--attn", "aft"], "aft is no linear attention"),
        ("bench_forms", ["--lengths", "0"], "at least 1"),
        ("bench_goals", ["--rounds", "0"], "at least 1"),
        ("bench_goals", ["--rows", "decode", "--publish"], "--publish needs a run of all rows"),
    ],
)
def test_a_wrong_request_is_one_clear_line(script: str, arguments: list[str], said: str) -> None:
    command = [sys.executable, f"scripts/{script}.py", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert said in line


def test_an_absent_peer_says_how_to_get_it_and_a_wrong_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(folder: Path | None) -> bench_peers.Kernel:
        return bench_peers.imported("no_such_package.kernel").kernel

    def broken(folder: Path | None) -> bench_peers.Kernel:
        raise RuntimeError("built for another torch")

    def unmasked(folder: Path | None) -> bench_peers.Kernel:
        return lambda q, k, v: (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None])

    def masked(folder: Path | None) -> bench_peers.Kernel:
        return lambda q, k, v: (w := (q @ k.mT).tril()) @ v / w.sum(-1, keepdim=True)

    loads = {"absent": absent, "broken": broken, "unmasked": unmasked, "masked": masked}
    peers = {name: bench_peers.Peer(name, load, "pip install it") for name, load in loads.items()}
    for name, peer in peers.items():
        monkeypatch.setitem(bench_peers.PEERS, name, peer)
        monkeypatch.setitem(bench_peers.WORDS, name, name)
    args = bench.parser(None, []).parse_args(["--max-length", "32"])
    args.install, args.compile = None, False
    found = bench_peers.contenders(list(peers), args)
    assert found.attend.keys() == {"hhbench", "masked"}
    assert found.notes["absent"] == "not installed: pip install it"
    assert found.notes["broken"] == "failed: RuntimeError: built for another torch"
    assert found.notes["unmasked"].startswith("disagrees with hhbench by ")
    assert found.disagree
    measured = bench_peers.cell(found, list(peers), "backward", 4096, bench.Effort(rounds=2, max_length=32))
    assert [row.value is not None for row in measured] == [False, False, False, True]


def test_a_crossover_s_spread_is_that_of_its_rounds() -> None:
    lengths = [128, 256, 512]
    # A power law crosses where it says: t_ours / t_softmax = 200 / N.
    power = np.array([200 / N for N in lengths])[:, None]
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, (1, 20)))
    row = bench_goals.crossover_row("x", "x", lengths, (power * noise).tolist())
    assert row.low < row.value < row.high
    # The noise of a median of 20, through the power law: 200 tokens times 0.1 * 1.25 / sqrt(20).
    assert 4 < row.high - row.low < 40
    still = bench_goals.crossover_row("x", "x", lengths, (power * np.ones((1, 20))).tolist())
    assert still.low == still.high == pytest.approx(200)
    assert still.details["ratios"]["256"] == pytest.approx(256 / 200)
    never = bench_goals.crossover_row("x", "x", lengths, [[2.0] * 5] * 3)
    assert never.value is None
    assert "softmax is still faster at 512" in never.note
    always = bench_goals.crossover_row("x", "x", lengths, [[0.5] * 5] * 3)
    assert (always.low, always.value, always.high) == (128, 128, 128)
    assert "already faster at 128" in always.note


@pytest.mark.parametrize(
    ("length", "low", "high", "speedup", "agreeing", "differing"),
    [
        (400.0, 380.0, 420.0, 5.0, (410, 450), (421, 450)),
        (400.0, None, 420.0, 5.0, (0, 10), (430, math.inf)),  # from below the first to 420
        (400.0, 380.0, None, 5.0, (9000, math.inf), (0, 370)),
        (None, None, None, 5.0, (0, 128), (129, 300)),  # below the first
        (None, None, 150.0, 5.0, (140, 300), (151, 300)),
        (None, None, None, 0.5, (4096, math.inf), (1000, 4095)),  # above the last
        (None, 3000.0, None, 0.5, (3000, 3100), (1000, 2999)),
    ],
)
def test_crossovers_agree_if_their_intervals_meet(
    length: float | None,
    low: float | None,
    high: float | None,
    speedup: float,
    agreeing: tuple[float, float],
    differing: tuple[float, float],
) -> None:
    stated = Crossover(
        attention="hedgehog", work="prefill", dtype="float32", against="softmax", length=length, low=low, high=high,
        first=128, last=4096, said="", speedup=speedup,
    )  # fmt: skip
    assert bench_goals.agrees(stated, *agreeing)
    assert not bench_goals.agrees(stated, *differing)


def test_what_the_compiled_form_does_not_serve_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [(1e-7, ["native"]), (2e-7, ["blocks"])]
    assert bench_goals.served(["blocks"])
    assert bench_goals.worst_row("x", "x", seen).value == 2e-7
    monkeypatch.setenv("HHBENCH_NATIVE", "1")
    assert bench_goals.served(["native", "native backward"])
    for ran in ([], ["blocks"], ["blocks", "native"]):
        assert not bench_goals.served(ran)
    row = bench_goals.worst_row("x", "x", seen)
    assert (row.value, row.rounds, row.details["ran"]) == (1e-7, 1, ["native"])
    row = bench_goals.worst_row("x", "x", seen[1:])
    assert row.value is None
    assert row.note.startswith("not served by the compiled form")


def test_without_a_compiler_compiled_rows_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path))
    picked = "forward-compiled,crossover-forward-compiled,decode-compiled,numerics-compiled"
    rows = rows_of(run("bench_goals", "--max-length", "32", "--rounds", "1", "--rows", picked))
    assert {
        "forward-compiled",
        "decode-1024-compiled",
        "crossover-forward-compiled",
        "error-outputs-compiled",
    } <= rows.keys()
    for row in rows.values():
        assert (row.value, row.reached) == (None, None)
        assert row.note.startswith("not served by the compiled form: no C compiler")


def test_a_ratio_is_of_medians_within_rounds() -> None:
    row = bench.ratio_row("x", "x", {"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, of="a", to="b")
    assert (row.value, row.rounds) == (2.0, 3)
    assert row.low == pytest.approx(2.0)
    assert row.high == pytest.approx(2.8)


def test_goals_are_reached_in_their_direction_only() -> None:
    row = bench.Row("x", "x", 5.0)
    assert row.towards(5).reached
    assert row.towards(6).reached is False
    assert row.towards(6, at_most=True).reached
    assert row.towards(4, at_most=True).reached is False
    assert row.towards(4, applies=False).reached is None


def test_the_truth_is_the_attention_in_float64() -> None:
    attention, inputs = bench.hedgehog().double(), [x.double() for x in bench.qkv(70)]
    truth, _ = bench_goals.exact(inputs, list(attention.parameters()))
    assert distance(attention(*inputs, form="quadratic"), truth) < 1e-13
    last, _ = bench_goals.exact((inputs[0][..., -9:, :], *inputs[1:]), list(attention.parameters()))
    assert distance(last, truth[..., -9:, :]) < 1e-13


def test_an_error_that_is_no_number_is_a_goal_missed() -> None:
    row = bench_goals.worst_row("x", "x", [(1e-7, ["blocks"]), (math.nan, ["blocks"])])
    assert row.reached is False
    assert "NaN" in bench.table({**bench.record("x", [row]), "rows": [asdict(row)]})


def test_the_published_tables_are_those_of_the_results() -> None:
    page = bench.PAGE.read_text()
    for start, text in bench.blocks().items():
        block = page.partition(start)[2].partition(bench.END)[0]
        assert block.strip("\n") == text.strip("\n"), "run scripts/bench.py: the page is not what the results say"


def test_published_results_have_all_rows() -> None:
    for path in bench.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        names = rows_of(found).keys()
        if path.stem == "peers":
            assert names == {f"{name}-{passes}-{N}" for name in bench_peers.WORDS for passes, N in bench_peers.CELLS}
        if path.stem == "goals":
            assert {"forward", "crossover-forward", "memory", "error-outputs-x50", "forward-hedgehog"} <= names
