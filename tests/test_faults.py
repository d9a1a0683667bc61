"""Nothing is lost: a run that is killed, starved or damaged anywhere ends right when it is run again."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults import BEGINNINGS, SIGKILL, Kept, Run, damage, files, finished, nothing_half_is_trusted, small_disk

from hhbench import data
from hhbench.tasks.glue import MOVIE_REVIEWS

STAGES = (*BEGINNINGS, "checkpointing")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that is long enough for what is made of it to be kept in the cache."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    words = ["".join(draw.choices("aeinorst", k=draw.randint(2, 7))) for _ in range(300)]
    path.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(6000)))
    return path


@pytest.fixture(scope="module")
def arguments(text):
    """A run that has every stage, each a second or so, with dropout; its folder and what is changed are added."""
    return [
        "run", "--task", "lm", "--dataset", str(text), "--attn", "hedgehog", "--regime", "finetuned-conversion",
        "--model", "gpt2-1x16x1", "--max-len", "32", "--dropout", "0.1", "--train-examples", "1536",
        "--test-examples", "64", "--batch-size", "16", "--teacher-epochs", "1", "--transfer-epochs", "2",
        "--epochs", "2", "--accelerator", "cpu", "--logger", "none",
    ]  # fmt: skip


class Uninterrupted:
    """The run that nothing happened to: what it left, and how long each of its stages took."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        out = folder / "out"
        run = Run([*arguments, "--out", str(out)], folder / "log", {"HHBENCH_CACHE": str(folder / "cache")})
        begun = {}
        for stage, begins in BEGINNINGS.items():
            assert run.until(lambda run, begins=begins: begins(out, run)), run.said
            begun[stage] = time.monotonic()
        assert run.wait() == 0, run.said
        ends = [*list(begun.values())[1:], time.monotonic()]
        self.seconds = {stage: end - start for (stage, start), end in zip(begun.items(), ends, strict=True)}
        self.kept = Kept.of(out)


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    return Uninterrupted(arguments, tmp_path_factory.mktemp("uninterrupted"))


class Hurt:
    """A run in a folder of its own, that may be started again and again."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.arguments, self.folder, self.out, self.starts = arguments, folder, folder / "out", 0

    def start(self, *more: str, **options) -> Run:
        self.starts += 1
        arguments = [*self.arguments, "--out", str(self.out), *("--resume",) * (self.starts > 1), *more]
        variables = {"HHBENCH_CACHE": str(self.folder / "cache")}
        return Run(arguments, self.folder / f"log-{self.starts}", variables, **options)

    def kill_in(self, stage: str, seconds: dict[str, float], draw: random.Random) -> None:
        """Start it and kill it at a random moment of a stage. Where it was done before, it begins anew, to be killed
        sooner.
        """
        nth = draw.randint(1, 6)  # checkpoint
        delay = draw.uniform(0, 0.02 if stage == "checkpointing" else 0.9 * seconds[stage])
        for attempt in range(8):
            run = self.start()
            if stage == "checkpointing":
                seen: set[Path] = set()
                run.until(lambda _, seen=seen: len(self._written(seen)) >= nth)
            else:
                run.until(lambda run: BEGINNINGS[stage](self.out, run))
            time.sleep(delay / 2**attempt)
            run.kill()
            nothing_half_is_trusted(self.out)
            if run.process.exitcode == SIGKILL:
                return
            assert run.process.exitcode == 0, run.said
            shutil.rmtree(self.out)
        raise AssertionError(f"{stage} is over too soon to be killed in")

    def _written(self, seen: set[Path]) -> set[Path]:
        """The checkpoints that were ever there, or begun, since the first look."""
        seen |= {path for path in files(self.out) if path.suffix in (".ckpt", ".part")}
        return seen

    def finish(self) -> Kept:
        run = self.start()
        assert run.wait() == 0, run.said
        return Kept.of(self.out)


@pytest.fixture
def hurt(arguments, tmp_path):
    return Hurt(arguments, tmp_path)


# ---- killed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_killed_once_in_each_stage_it_ends_as_if_nothing_had_been(hurt, uninterrupted, stage):
    hurt.kill_in(stage, uninterrupted.seconds, random.Random(stage))
    assert hurt.finish() == uninterrupted.kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_killed_one_to_three_times_anywhere_it_ends_as_if_nothing_had_been(hurt, uninterrupted, seed):
    draw = random.Random(1000 + seed)
    for _ in range(draw.randint(1, 3)):
        hurt.kill_in(draw.choice(STAGES), uninterrupted.seconds, draw)
    assert hurt.finish() == uninterrupted.kept


@pytest.mark.network
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_while_it_fetches_it_fetches_again(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "cache"))
    fetch, variables = ["data", "fetch", MOVIE_REVIEWS.name], {"HHBENCH_CACHE": str(tmp_path / "cache")}
    run = Run(fetch, tmp_path / "log", variables)
    assert run.until(lambda run: "fetching" in run.said)
    time.sleep(random.Random(seed).uniform(0, 2))
    tools = run.children()
    run.kill()
    for pid in tools:  # pip would go on, and into a folder that the next run clears
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert data.status(MOVIE_REVIEWS) in ("missing", "ready")
    finished(fetch, tmp_path / "again", variables=variables)
    assert data.status(MOVIE_REVIEWS) == "ready"
    assert not any((tmp_path / "cache" / "downloads").iterdir())


# ---- damaged ---------------------------------------------------------------------------------------------------


def stopped_with_checkpoints(hurt: Hurt, count: int = 2) -> list[Path]:
    """Kill it in finetuning when there are so many checkpoints; from the oldest to the newest."""
    run = hurt.start()
    assert run.until(lambda run: BEGINNINGS["finetuning"](hurt.out, run) and len(checkpoints_of(hurt.out)) >= count), (
        f"it was done before it had {count} checkpoints:\n{run.said}"
    )
    run.kill()
    return checkpoints_of(hurt.out)


def checkpoints_of(out: Path) -> list[Path]:
    """Of the run, not of its teacher: from the oldest to the newest."""
    found = [path for path in files(out / "lm") if path.match("step-*.ckpt")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("how", ["flipped", pytest.param("cut", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(hurt, uninterrupted, how):
    checkpoints = stopped_with_checkpoints(hurt)
    damage(checkpoints[-1], how, random.Random(how).random())
    assert hurt.finish() == uninterrupted.kept
    assert checkpoints[-1].name in (hurt.folder / "log-2").read_text()  # it is said which one was not trusted
    assert "continuing" in (hurt.folder / "log-2").read_text()


@pytest.mark.slow
def test_with_every_checkpoint_damaged_the_stage_starts_again(hurt, uninterrupted):
    for path in stopped_with_checkpoints(hurt):
        damage(path, "cut", 0.0)
    assert hurt.finish() == uninterrupted.kept
    assert "continuing" not in (hurt.folder / "log-2").read_text()


@pytest.mark.slow
def test_what_a_finished_stage_left_is_not_trusted_when_it_is_damaged(hurt, uninterrupted):
    stopped_with_checkpoints(hurt, 0)
    (kept,) = hurt.out.glob("lm/**/transfer/finished-*.safetensors")
    damage(kept, "flipped", 0.9)
    assert hurt.finish() == uninterrupted.kept
    assert kept.name in (hurt.folder / "log-2").read_text()


# ---- starved ---------------------------------------------------------------------------------------------------


def fails_in_one_line(run: Run) -> str:
    """What a run says that ends in exit code 1 or 2: its last line, and no trace."""
    assert run.wait() in (1, 2), run.said
    assert "Traceback" not in run.said, run.said
    last = run.said.strip().splitlines()[-1]
    assert last.startswith("hhbench: "), run.said
    return last


def test_a_full_disk_ends_it_in_one_line_and_with_room_it_goes_on(hurt, uninterrupted):
    with small_disk(hurt.out, "60k") as reason:
        if reason:
            pytest.skip(reason)
        line = fails_in_one_line(hurt.start())
        assert "No space left" in line or "written" in line, line
        nothing_half_is_trusted(hurt.out)
    assert hurt.finish() == uninterrupted.kept


def test_a_disk_that_is_full_of_checkpoints_costs_the_checkpoints_not_the_run(hurt, uninterrupted):
    kept = Hurt(hurt.arguments, hurt.folder / "first")
    run = kept.start(largest_file=100_000)  # a checkpoint, with the optimizer's state, is larger, and a model smaller
    assert run.wait() == 0, run.said
    assert "can't be written" in run.said
    assert Kept.of(kept.out) == uninterrupted.kept


def test_an_output_that_is_read_only_is_refused_at_once(hurt):
    if os.geteuid() == 0:
        with small_disk(hurt.out, options=",ro") as reason:
            if reason:
                pytest.skip(reason)
            line = fails_in_one_line(hurt.start())
    else:
        hurt.out.mkdir()
        hurt.out.chmod(0o555)
        line = fails_in_one_line(hurt.start())
    assert str(hurt.out) in line and "read-only" in line
    assert not any(hurt.out.iterdir())


# ---- two at once -----------------------------------------------------------------------------------------------


def test_of_two_runs_of_one_key_the_second_waits_and_finds_the_result(hurt, uninterrupted):
    first, second = hurt.start(), hurt.start()
    assert (first.wait(), second.wait()) == (0, 0), first.said + second.said
    assert Kept.of(hurt.out) == uninterrupted.kept
    assert sorted("done already" in run.said for run in (first, second)) == [False, True]


def test_a_run_whose_rival_is_killed_takes_over(hurt, uninterrupted):
    first = hurt.start()
    assert first.until(lambda run: BEGINNINGS["transfer"](hurt.out, run))
    second = hurt.start()
    assert second.until(lambda run: "  stages: " in run.said)
    time.sleep(0.5)
    first.kill()
    assert second.wait() == 0, second.said
    assert Kept.of(hurt.out) == uninterrupted.kept


# ---- no number, no worker --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--teacher-lr", "--transfer-lr", "--lr"])
def test_a_loss_that_is_no_number_stops_the_run_with_the_step_and_the_layer(hurt, flag):
    line = fails_in_one_line(hurt.start(flag, "1e38", "--clip", "0", "--warmup", "0"))
    assert re.search(rf"at step \d+: .*transformer\.(h\.0|wte).* lower {flag}", line), line
    nothing_half_is_trusted(hurt.out)
    assert not any(hurt.out.rglob("result.json"))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_loader_worker_that_dies_is_an_error_not_a_hang(hurt, uninterrupted, number):
    run = hurt.start("--workers", "2")
    assert run.until(lambda run: len(run.children()) >= 2), run.said
    os.kill(run.children()[0], number)
    assert run.wait() == 1, run.said
    # Where the other worker was just handing over a tensor, its multiprocessing thread may have its say before. What
    # torch says of a segmentation fault ends with a NUL.
    assert re.match(r"\0?hhbench: .*worker", run.said.strip().splitlines()[-1]), run.said
    assert hurt.finish() == uninterrupted.kept


def test_what_hurts_a_run_does_hurt_it(hurt, tmp_path):
    """The tools of these tests do what they say."""
    run = hurt.start()
    assert run.until(lambda run: "  stages: " in run.said)
    run.kill()
    assert run.wait() == SIGKILL and not any(hurt.out.rglob("result.json"))
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    damage(path, "flipped", 0.5)
    assert path.read_bytes() == bytes(50) + b"\xff" + bytes(49)
    damage(path, "cut", 0.1)
    assert path.read_bytes() == bytes(10)
