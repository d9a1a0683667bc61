"""Profiles and scripts, and what a real Slurm of two nodes does with them: see slurm_cluster.py."""

import contextlib
import getpass
import os
import random
import re
import shlex
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import slurm_cluster
import yaml
from slurm_cluster import NODES, Cluster

from hhbench import leaderboard, result, slurm, submit
from hhbench.attention import ATTENTIONS
from hhbench.cli import main
from hhbench.errors import HHBenchError, UsageError

TINY = [
    "--task", "recall", "--dataset", "ar", "--model", "gpt2-1x16x2", "--max-len", "16", "--train-examples", "64",
    "--test-examples", "16", "--batch-size", "16", "--epochs", "1", "--accelerator", "cpu", "--logger", "none",
]  # fmt: skip
# Takes its time, so that what is done to it finds it at work; and writes down that it is.
SLOW = """\
import os
import time

from hhbench.attention import FeatureMap


class Slow(FeatureMap):
    def forward(self, x):
        if self.training and "SLURM_PROCID" in os.environ:
            rank = os.environ["SLURM_PROCID"]
            with open("pid-" + rank, "w") as file:
                file.write(str(os.getpid()))
            with open("steps-" + rank, "a") as file:
                file.write(".")
            time.sleep(0.5 if os.path.exists("slower") else 0.02)
        return x.relu() + 1
"""
FAILS = """\
from hhbench.attention import FeatureMap


class Fails(FeatureMap):
    def forward(self, x):
        if self.training and x.requires_grad:
            raise RuntimeError("it was bound to happen")
        return x.relu() + 1
"""


# ---- times, ranges, profiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("01:00:00", 3600),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("1-12:30", 86400 + 12 * 3600 + 1800),
        ("1-00:00:01", 86401),
    ],
)
def test_times_as_slurm_writes_them(time, seconds):
    assert slurm.seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["", "soon", "1:2:3:4", "-5", "1h", "0", "00:00:00"])
def test_what_is_no_time(time):
    with pytest.raises(UsageError):
        slurm.seconds_of(time)


def test_ranges():
    assert slurm.ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"


def profile(tmp_path: Path, text: str, **given) -> slurm.ClusterProfile:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return slurm.profile_of(path, **given)


def test_a_profile_and_what_is_given_over_it(tmp_path):
    made = profile(
        tmp_path,
        "partition: gpu\ntime: '08:00:00'\ngpus: a100\ncpus_per_device: 4\nenvironment: {N: 1}\nmodules: [cuda/12.4]\n",
        partition="debug",
        time=None,
    )
    assert made.partition == "debug"
    assert (made.seconds, made.signal_seconds) == (8 * 3600, 120)
    assert made.environment == {"N": "1"}
    options = made.options(nodes=2, devices=8, on_gpus=True)
    assert {"--gpus-per-node=a100:8", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=4"} <= set(options)
    assert not any("gpus" in option for option in made.options(nodes=2, devices=8, on_gpus=False))


def test_gpus_of_any_type_or_by_gres(tmp_path):
    assert "--gpus-per-node=4" in profile(tmp_path, "gpus: any").options(nodes=1, devices=4, on_gpus=True)
    assert "--gres=gpu:v100:4" in profile(tmp_path, "gres: gpu:v100").options(nodes=1, devices=4, on_gpus=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu", "Did you mean 'partition'?"),
        ("- partition", "one `name: value` a line"),
        ("partition: [a, b]", "partition must be text"),
        ("partition: |\n  a\n  #SBATCH --account=b", "must be one line"),
        ("modules: ['a\\u0007']".replace("'", '"'), "must be one line"),
        ("time: 4:00:00", "in quotes"),
        ("time: soon", "not 'soon'"),
        ("time: '5'\nsignal: 300", "give more time"),
        ("throttle: 0", "at least 1"),
        ("environment: {'A B': x}", "no variable's name"),
        ("environment: {1: x}", "no variable's name"),
        ("environment: {A: [x]}", "environment.A must be text"),
        ("gpus: any\ngres: gpu", "name one of them"),
        ("memory: lots", "written as 64G"),
        ("sbatch: [-N2]", "--name=value"),
        ("sbatch: [--array=0-5]", "hhbench sets itself"),
        ("srun: ['--nodes=3']", "hhbench sets itself"),
        ("!!python/object/apply:os.system ['true']", "can't be read"),
    ],
)
def test_a_profile_that_is_refused(tmp_path, text, said):
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        profile(tmp_path, text)
    assert "cluster.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_signal_leaves_time_to_work():
    assert slurm.ClusterProfile(time="1").signal_seconds == 30
    with pytest.raises(UsageError):
        slurm.ClusterProfile(time="1", signal=60)


def test_the_example_profile_is_one():
    example = Path(__file__).parents[1] / "scripts" / "slurm" / "cluster.yaml"
    assert slurm.profile_of(example).partition
    # What is commented out in it is right too.
    text = re.sub(r"^# (?=[a-z_]+:)", "", example.read_text(), flags=re.MULTILINE)
    fields = set(yaml.safe_load(text))
    assert fields == set(slurm.ClusterProfile.__dataclass_fields__)


# ---- scripts ---------------------------------------------------------------------------------------------------


def array(**changes) -> slurm.Array:
    fields = {
        "name": "hhbench-x", "configs": Path("/o/trials"), "told": "/o/results/", "logs": "/o/logs/trial-",
        "indices": [0, 1, 3], "nodes": 2, "devices": 4, "on_gpus": True, "workdir": Path("/w"),
    }  # fmt: skip
    return slurm.Array(**fields | changes)


def test_a_script_says_what_a_trial_needs():
    text = slurm.script(array(flags=["--allow-code"]), slurm.ClusterProfile(throttle=2, time="10", cpus_per_device=3))
    for line in (
        "--array=0-1,3%2", "--requeue", "--open-mode=append", "--signal=USR1@120", "--nodes=2", "--ntasks-per-node=4",
        "--time=10", "--output=/o/logs/trial-%4a.log",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    assert "export OMP_NUM_THREADS=3\n" in text
    last = text.replace("\\\n", "").splitlines()[-1]
    assert shlex.split(last)[:2] == ["exec", "srun"]
    assert "--cpus-per-task=3" in shlex.split(last)
    assert " ".join(last.split()).endswith('-u -m hhbench run --config /o/trials/"$n".yaml --allow-code --resume')


def test_a_container_has_its_own_python():
    text = slurm.script(array(), slurm.ClusterProfile(container=["apptainer", "exec", "--nv", "my image.sif"]))
    assert "apptainer exec --nv 'my image.sif' python -u -m hhbench run" in text


def test_no_text_of_a_user_is_read_as_shell(tmp_path):
    bad = """'; touch pwned; "$(touch pwned)" `touch pwned` \\ # &"""
    text = slurm.script(
        array(workdir=tmp_path, configs=tmp_path / bad, told=f"{tmp_path}/{bad}", logs=f"{tmp_path}/a 'b' $(c) #"),
        slurm.ClusterProfile(
            account=bad,
            modules=[bad],
            environment={"GIVEN": bad},
            container=[bad],
            python=bad,
            sbatch=[f"--comment={bad}"],
            srun=[f"--comment={bad}"],
        ),
    )
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(len(option) == 1 for option in options)
    assert [f"--account={bad}"] in options
    # Its commands print what they were called with.
    shown = 'show() { printf "%s\\n" "$@" GIVEN="$GIVEN"; }; module() { show "$@"; }; srun() { show "$@"; }\n'
    body = shown + text.replace("exec srun", "srun")
    done = subprocess.run(
        ["bash", "-c", body], cwd=tmp_path, env={"SLURM_ARRAY_TASK_ID": "7"}, capture_output=True, text=True, check=True
    )
    said = done.stdout.splitlines()
    assert said[:2] == ["load", bad]
    assert f"GIVEN={bad}" in said
    assert said.count(bad) == 3  # the module, the container, python
    assert f"{tmp_path}/{bad}/0007.yaml" in said
    assert [path.name for path in tmp_path.iterdir()] == []
    assert done.stderr == ""


def test_a_start_removes_what_an_earlier_one_said(tmp_path):
    for name in ("0007.failed", "0007.stopped", "0008.failed"):
        (tmp_path / name).write_text("of the start before")
    text = slurm.script(array(workdir=tmp_path, told=f"{tmp_path}/"), slurm.ClusterProfile(time="1"))
    body = 'srun() { echo "$HHBENCH_RESULT_PATH" "$HHBENCH_SIGNAL_SECONDS"; }\n' + text.replace("exec srun", "srun")
    done = subprocess.run(
        ["bash", "-c", body], env={"SLURM_ARRAY_TASK_ID": "7"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path}/0007 30\n"
    assert [path.name for path in tmp_path.iterdir()] == ["0008.failed"]


def test_a_folder_that_slurm_cannot_name():
    for name in ("a\nb", "a\\b"):
        with pytest.raises(UsageError, match="line break or backslash"):
            slurm.script(array(logs=f"/o/{name}/trial-"), slurm.ClusterProfile())


def test_without_slurm_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch on this machine's PATH"):
        slurm.check(slurm.ClusterProfile(), nodes=1, largest_index=0)
    with pytest.raises(HHBenchError, match="no squeue on this machine's PATH"):
        slurm.standings("x")


# ---- on a real Slurm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; every worker of pytest-xdist has its own."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.started() as one:
        yield one


@pytest.fixture
def here(cluster: Cluster, tmp_path, monkeypatch):
    """An empty folder to work in, with the cluster's commands; and an idle cluster."""
    for name in [name for name in os.environ if name not in cluster.environment]:
        monkeypatch.delenv(name)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    cluster.run("scancel", f"--user={getpass.getuser()}", check=False)
    cluster.until_idle()
    # Any name that a folder may have.
    folder = tmp_path / "a b'c%d#e\"f;$(touch pwned)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "slow.py").write_text(SLOW)
    (folder / "fails.py").write_text(FAILS)
    return folder


def submitted(*arguments: str, time: str = "10", out: str = "runs") -> submit.Submission:
    assert main(["submit", "--on", "slurm", "--time", time, *TINY, *arguments, "--out", out]) == 0
    return submit.find_submission(Path(out), None)


def words(submission: submit.Submission) -> list[str]:
    return [trial.word for trial in submit.progress(submission)]


def until_over(cluster: Cluster, submission: submit.Submission, seconds: float = 240) -> list[submit.Progress]:
    """How far each trial is, once none is under way."""
    cluster.until("the trials are over", lambda: not {"running", "pending"} & set(words(submission)), seconds)
    return submit.progress(submission)


def until_at_work(cluster: Cluster, folder: Path, more_than: int = 0) -> int:
    """Wait until both ranks train, and return how far one is."""

    def steps() -> int:
        files = [folder / f"steps-{rank}" for rank in (0, 1)]
        return min(file.stat().st_size if file.exists() else 0 for file in files)

    cluster.until("both ranks train", lambda: steps() > more_than + 60, 120)
    return steps()


def preempt(cluster: Cluster) -> None:
    """A job of the higher partition takes both nodes, and is over."""
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap=true"
    )
    cluster.until("the urgent job is done", lambda: "COMPLETED" in cluster.jobs(urgent.stdout.strip()).values())


def log_of(submission: submit.Submission) -> str:
    return submission.log(0).read_text()


def test_two_nodes_train_one_model(cluster, here, capsys):
    submission = submitted("--attn", "elu", "--num-nodes", "2")
    (trial,) = until_over(cluster, submission)
    assert trial.word == "done", log_of(submission)
    assert trial.result.environment["world_size"] == 2
    capsys.readouterr()
    assert main(["status"]) == 0
    assert "1 trial: 1 done" in capsys.readouterr().out
    assert main(["collect", "--to", "kept"]) == 0
    assert "| elu" in capsys.readouterr().out
    (kept,) = Path("kept").iterdir()
    assert result.load(kept) == trial.result
    assert main(["submit", "--on", "slurm", *TINY, "--attn", "elu"]) == 0
    assert "all done already" in capsys.readouterr().out
    assert not (here / "pwned").exists()


def test_an_array_goes_on_when_a_trial_fails(cluster, here, capsys):
    conversion = ["--regime", "finetuned-conversion", "--teacher-epochs", "1"]
    submission = submitted("--attn", "elu,fails.py:Fails", *conversion, "--throttle", "2")
    assert len(submission.record.teachers) == 1
    trials = until_over(cluster, submission)
    assert [trial.word for trial in trials] == ["done", "failed"], log_of(submission)
    assert "it was bound to happen" in trials[1].note
    assert submit.failures_of_teachers(submission) == []
    assert len(list(Path("runs", "teachers").glob("*/"))) == 1
    capsys.readouterr()
    assert main(["collect", submission.id]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 failed" in shown
    assert "it was bound to happen" in shown


def test_preempted_it_goes_on_where_it_was(cluster, here):
    submission = submitted("--attn", "slow.py:Slow", "--num-nodes", "2", "--epochs", "40")
    before = until_at_work(cluster, here)
    preempt(cluster)
    (trial,) = until_over(cluster, submission)
    assert trial.word == "done", log_of(submission)
    said = log_of(submission)
    assert "Slurm starts it again" in said
    assert "continuing train" in said
    whole = 40 * 4 * 2  # epochs, steps of an epoch, calls of a step: the map is asked for queries and for keys
    assert before < (here / "steps-0").stat().st_size < whole + before


# What a fault does to two ranks at work; docs/clusters.md says the same in words.

LONG = ("--attn", "slow.py:Slow", "--num-nodes", "2", "--epochs", "40")


def job_of(submission: submit.Submission) -> str:
    """The id of its one task, as scontrol takes it."""
    (standing,) = slurm.standings(submission.jobs[1]).values()
    return f"{standing.job}_0"


def uninterrupted(cluster: Cluster, *arguments: str) -> result.Result:
    """What the same trial comes to when nothing happens to it."""
    submission = submitted(*arguments, out="undisturbed")
    (trial,) = until_over(cluster, submission)
    assert trial.result is not None, trial.note
    return trial.result


@pytest.mark.slow
def test_a_trial_longer_than_its_time_limit_ends_like_one_that_is_not(cluster, here):
    slower = here / "slower"
    slower.touch()
    submission = submitted(*LONG, "--signal", "20", time="2")
    log = submission.log(0)
    cluster.until("its time is over", lambda: log.exists() and "Slurm starts it again" in log.read_text(), 240)
    slower.unlink()
    (trial,) = until_over(cluster, submission, 600)
    assert trial.word == "done", log_of(submission)
    assert "continuing train" in log_of(submission)
    assert trial.result.metrics == uninterrupted(cluster, *LONG).metrics


@pytest.mark.slow
def test_a_job_that_is_requeued_ends_like_one_that_is_not(cluster, here):
    submission = submitted(*LONG)
    until_at_work(cluster, here)
    cluster.run("scontrol", "requeue", job_of(submission))
    (trial,) = until_over(cluster, submission)
    assert trial.word == "done", log_of(submission)
    assert trial.result.metrics == uninterrupted(cluster, *LONG).metrics


@pytest.mark.slow
def test_a_task_that_is_told_to_end_starts_again_alone(cluster, here):
    """SIGTERM, though nothing ends the job: as from a cluster that preempts without the job's own signal. The array's
    last task has the id of the whole array.
    """
    submission = submitted("--attn", "elu,slow.py:Slow", *LONG[2:], "--throttle", "1")
    until_at_work(cluster, here)
    first = submission.log(0).read_text()
    cluster.run("scancel", "--signal=TERM", f"{slurm.standings(submission.jobs[1])[1].job}_1.0")
    trials = until_over(cluster, submission)
    said = submission.log(1).read_text()
    assert [trial.word for trial in trials] == ["done", "done"], said
    assert "Slurm starts it again" in said
    assert "continuing train" in said
    assert submission.log(0).read_text() == first


@pytest.mark.slow
def test_a_killed_rank_ends_the_trial_and_the_same_again_goes_on(cluster, here):
    submission = submitted(*LONG)
    until_at_work(cluster, here)
    (number,) = (standing.job for standing in slurm.standings(submission.jobs[1]).values())
    kill = ["srun", "--overlap", f"--jobid={number}", "-N1", "-w", "node2", "bash", "-c", 'kill -9 "$(cat pid-1)"']
    cluster.run(*kill, check=False)  # it may be ended with the job
    (trial,) = until_over(cluster, submission, 60)
    assert trial.word == "failed"
    assert "task 1: Killed" in log_of(submission)
    again = submitted(*LONG)
    assert again.id != submission.id
    (trial,) = until_over(cluster, again)
    assert trial.word == "done", log_of(again)


@pytest.mark.slow
@pytest.mark.parametrize("node", NODES)
def test_a_node_that_dies_is_done_without(cluster, here, node):
    submission = submitted(*LONG)
    until_at_work(cluster, here)
    cluster.kill_node(node)
    slower = here / "slower"
    slower.touch()
    try:
        cluster.until("the job waits for a node", lambda: words(submission) == ["pending"], 120)
    finally:
        cluster.start_node(node)
    # Slurm 22.05 tries once a minute to tell a node what it missed. For node2 that is srun's order to end the step,
    # which has its number again by then: the trial is to be at work when it comes.
    cluster.until("the job is started again", lambda: words(submission) == ["running"], 120)
    with contextlib.suppress(TimeoutError):
        slurm_cluster.until("the order comes", lambda: "Slurm starts it again" in log_of(submission), 70)
    slower.unlink()
    (trial,) = until_over(cluster, submission, 300)
    assert trial.word == "done", log_of(submission)


@pytest.mark.slow
def test_a_node_whose_name_does_not_resolve_is_said_at_once(cluster, here):
    if not cluster.namespaced:
        pytest.skip("the nodes have no names of their own here: their namespaces are refused")
    # As on a cluster whose nodes have other names than the network knows.
    hide = f"umount /etc/hosts && hostname {os.uname().nodename}"
    cluster.run("srun", "-N2", "bash", "-c", hide)
    try:
        submission = submitted("--attn", "elu", "--num-nodes", "2")
        (trial,) = until_over(cluster, submission, 60)
    finally:
        show = f'mount --bind "{cluster.folder}/hosts" /etc/hosts && hostname "$SLURMD_NODENAME"'
        cluster.run("srun", "-N2", "bash", "-c", show)
    assert trial.word == "failed"
    assert "'node1' doesn't resolve" in trial.note


@pytest.mark.slow
def test_what_is_cancelled_is_stopped_and_goes_on_when_it_is_sent_again(cluster, here, capsys):
    submission = submitted(*LONG, "--attn", "elu,slow.py:Slow", "--throttle", "1")
    until_at_work(cluster, here)
    capsys.readouterr()
    assert main(["cancel"]) == 0
    assert "cancelled 1 task of" in capsys.readouterr().out
    trials = until_over(cluster, submission, 60)
    assert sorted(trial.word for trial in trials) == ["done", "stopped"]
    assert main(["status", submission.id]) == 0
    assert re.search(r"slow\.py:Slow s0 +stopped +(stopped by a signal|CANCELLED)", capsys.readouterr().out)
    # The script that lies there, sent again by hand.
    cluster.run("sbatch", str(submission.folder / "trials.sh"))
    assert [trial.word for trial in until_over(cluster, submission)] == ["done", "done"]


# Every attention: recall from scratch; glue on a pretrained encoder, which has learnt something by then, so that no two
# attentions need come to the same score. At the mini presets' own size, which takes an hour or two, and small, each at
# work for some seconds.
TABLE = ["--task", "recall,glue", "--attn", "all", "--accelerator", "cpu", "--logger", "none"]
SMALL = [
    "--dataset", "ar,movie-reviews", "--max-len", "32", "--train-examples", "256", "--test-examples", "128",
    "--batch-size", "8", "--epochs", "1", "--teacher-epochs", "1", "--transfer-epochs", "1", "--lr", "2e-4",
    "--teacher-lr", "2e-4",
]  # fmt: skip


def tables_of(results: Iterable[result.Result]) -> dict[str, list[leaderboard.Row]]:
    """The leaderboard's rows by table, without what was measured by the clock."""
    return {
        table.title: [replace(row, tokens_per_s=None, peak_memory_mb=None) for row in table.rows]
        for table in leaderboard.tables(results)
    }


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(("size", "datasets", "longest"), [(SMALL, 1, 12), ([], 2, 60)], ids=["small", "mini"])
def test_a_sweep_that_is_preempted_makes_the_table_of_a_laptop(cluster, here, monkeypatch, size, datasets, longest):
    """`datasets` of each task, and the `longest` time that a trial is left at work, about, before it is preempted."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["sweep", *TABLE, *size, "--parallel", "2", "--out", "laptop"]) == 0
    by_laptop = tables_of(result.find(Path("laptop"))[0])
    every = ATTENTIONS.names()
    assert [len(rows) for rows in by_laptop.values()] == [len(every)] * len(by_laptop)
    assert len(by_laptop) >= 2

    submit_it = ["submit", "--on", "slurm", "--time", "30", "--throttle", "2", *TABLE, *size, "--out", "cluster"]
    assert main(submit_it) == 0
    submission = submit.find_submission(Path("cluster"), None)
    logs = [submission.log(i) for i in range(len(submission.record.trials))]
    assert len(logs) == 2 * datasets * len(every)

    def has_its_model(log: Path) -> bool:
        return log.exists() and " parameters to " in log.read_text()

    draw = random.Random(7)
    for log in (*logs[2 : len(every) : 5], *logs[len(every) :: 3]):
        cluster.until(f"{log.name} says that it has its model", partial(has_its_model, log), 900)
        time.sleep(draw.uniform(0, longest))  # to find it at whatever it does next
        preempt(cluster)
    trials = until_over(cluster, submission, 7200)
    assert {trial.word for trial in trials} == {"done"}, [trial.note for trial in trials]
    started_again = [log.name for log in logs if "Slurm starts it again" in log.read_text()]
    went_on = [log.name for log in logs if "continuing " in log.read_text()]
    print(f"{len(started_again)} of {len(logs)} trials were started again, {len(went_on)} from a checkpoint")
    assert len(started_again) >= 2
    assert went_on
    assert tables_of(trial.result for trial in trials) == by_laptop


def test_what_this_cluster_cannot_do_is_refused_before_anything_is_sent(cluster, here, capsys):
    for arguments, said in [
        (["--partition", "mian"], "Did you mean 'main'?"),
        (["--num-nodes", "4"], "partition main has 2"),
        (["--time", "2-00:00:00"], "longer than partition main allows"),
        (["--num-nodes", "2", "--devices", "3"], "can't be divided over 6 devices"),
        (["--time", "1", "--signal", "90"], "give more time"),
        (["--devices", "16"], "sbatch refuses"),
        (["--devices", "2", "--hosts", "a,b"], "Slurm chooses the machines"),
    ]:
        capsys.readouterr()
        assert main(["submit", "--on", "slurm", "--partition", "main", *TINY, "--attn", "elu", *arguments]) != 0, said
        shown = capsys.readouterr().err
        assert said in shown
        assert len(shown.strip().splitlines()) == 1
        assert not Path("runs", "submissions").exists() or not list(Path("runs", "submissions").iterdir())
    assert cluster.run("squeue", "-h").stdout == ""
