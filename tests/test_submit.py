"""A submission's folder, what it says before and after it is sent, and torchrun. What Slurm does: test_slurm.py."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from hhbench import result, slurm, submit, torchrun
from hhbench.cli import main
from hhbench.errors import HHBenchError, UsageError

TINY = [
    "--task", "recall", "--dataset", "ar", "--model", "gpt2-1x16x2", "--max-len", "16", "--train-examples", "64",
    "--test-examples", "16", "--batch-size", "16", "--epochs", "1", "--accelerator", "cpu", "--logger", "none",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with one trial of two done."""
    out = tmp_path_factory.mktemp("done")
    assert main(["run", *TINY, "--attn", "elu", "--out", str(out)]) == 0
    return out


def written(on: str = "torchrun", trials: int = 3, teachers: int = 0) -> submit.Submission:
    """A submission as its folder shows it."""
    folder = Path("runs", "submissions", f"20260101-00000{len(list(Path().glob('runs/submissions/*')))}-abcdef")
    for name in ("results", "logs"):
        (folder / name).mkdir(parents=True)
    record = {
        "schema": 1, "on": on, "created": "2026-01-01T00:00:00+00:00", "nodes": 1, "devices": 1,
        "trials": [{"name": f"trial-{i}", "title": f"trial {i}"} for i in range(trials)],
        "teachers": [{"name": f"teacher-{i}", "title": f"teacher {i}"} for i in range(teachers)],
    }  # fmt: skip
    (folder / submit.RECORD).write_text(json.dumps(record))
    return submit.find_submission(Path("runs"), None)


# ---- before it is sent -----------------------------------------------------------------------------------------


def test_the_plan_says_what_it_costs_and_writes_nothing(call, done):
    before = sorted(done.rglob("*"))
    code, out, _ = call(
        "submit", "--on", "slurm", "--plan", *TINY, "--attn", "elu,relu", "--seeds", "0:2", "--num-nodes", "2",
        "--time", "00:30:00", "--throttle", "2", "--out", done,
    )  # fmt: skip
    assert code == 0
    assert "4 trials: 1 done already, 3 to run" in out
    assert "1 array job of 3 tasks on 2 nodes x 1 device, at most 2 at a time" in out
    assert "at most 3.0 by the time limit" in out
    assert "by earlier results, which 1 of 3 trials have" in out
    (measured,) = result.find(done)[0]
    assert f"about {measured.cost['peak_memory_mb'] / 1000:.1f} GB for each device" in out
    indices = re.search(r"--array=(\S+)%2\n", out)[1]
    assert indices == "1-3"
    assert out.rstrip().endswith("plan: nothing written, nothing sent")
    assert sorted(done.rglob("*")) == before


def test_a_gpu_of_another_machine_may_be_asked_for(call):
    Path("cluster.yaml").write_text("gpus: any\n")
    Path("run.yaml").write_text("accelerator: cuda\ndevices: 4\n")
    flags = [flag for flag in TINY if flag not in ("--accelerator", "cpu")]
    asked = ["submit", "--on", "slurm", "--plan", "--cluster", "cluster.yaml", *flags, "--attn", "elu"]
    code, out, _ = call(*asked, "--config", "run.yaml")
    assert code == 0
    assert "#SBATCH --ntasks-per-node=4\n" in out
    assert "#SBATCH --gpus-per-node=4\n" in out
    assert "--gpus-per-node" not in call(*asked, "--accelerator", "cpu")[1]
    code, _, err = call("submit", "--on", "slurm", "--plan", *TINY, "--attn", "elu", "--accelerator", "cdua")
    assert code == 2
    assert "Did you mean 'cuda'?" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "slrum"], "Did you mean 'slurm'?"),
        (["--on", "slurm", "--time", "soon"], "not 'soon'"),
        (["--on", "slurm", "--partition", "a\n#SBATCH --account=b"], "one line"),
        (["--on", "slurm", "--cluster", "missing.yaml"], "can't be read"),
        (["--on", "slurm", "--throttle", "0"], "at least 1"),
        (["--on", "torchrun", "--partition", "main"], "--partition is for --on slurm"),
        (["--on", "torchrun", "--num-nodes", "2"], "needs the names of 2 machines"),
        (["--on", "torchrun", "--num-nodes", "2", "--hosts", "a,a"], "twice"),
        (["--on", "torchrun", "--devices", "3"], "can't be divided over 3 devices"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, arguments, said):
    code, _, err = call("submit", *TINY, "--attn", "elu", *arguments)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_a_trial_is_the_run_that_was_asked_for(call):
    """Its file, read by `hhbench run --config`, gives the same settings."""
    code, _, _ = call(
        "submit", "--on", "torchrun", *TINY, "--attn", "taylor", "--option", "project_to=8", "--seeds", "3",
        "--num-nodes", "2", "--hosts", "a,b", "--clip", "0", "--checkpoint-minutes", "0",
    )  # fmt: skip
    assert code == 0
    submission = submit.find_submission(Path("runs"), None)
    values = yaml.safe_load((submission.folder / "trials" / "0000.yaml").read_text())
    assert (values["attn"], values["option"], values["seed"]) == ("taylor", {"project_to": 8}, 3)
    assert values["num_nodes"] == 2
    assert (values["clip"], values["checkpoint_minutes"]) == (0, 0)
    assert values["out"] == str(Path("runs").absolute())


def test_what_is_done_already_is_collected_with_the_rest(call, done):
    code, out, _ = call(
        "submit", "--on", "torchrun", *TINY, "--attn", "relu,elu", "--num-nodes", "2", "--hosts", "a,b", "--out", done,
    )  # fmt: skip
    assert code == 0
    assert "2 trials: 1 done already, 1 to run" in out
    trials = submit.progress(submit.find_submission(done, None))
    assert [trial.word for trial in trials] == ["pending", "done"]
    assert [trials[1].result] == result.find(done)[0]


# ---- torchrun --------------------------------------------------------------------------------------------------


def test_each_machine_gets_its_command(call):
    code, out, _ = call(
        "submit", "--on", "torchrun", "--plan", *TINY, "--attn", "elu,relu", "--devices", "4", "--num-nodes", "2",
        "--hosts", "gpu1,gpu2",
    )  # fmt: skip
    assert code == 0
    assert re.search(r"on gpu1: bash \S+/torchrun.sh 0\n  on gpu2: bash \S+/torchrun.sh 1\n", out)
    assert len(re.findall(r"--nnodes=2 --master-addr=gpu1 --master-port=29400 --node-rank=\"\$1\"", out)) == 1
    assert "--master-port=29401" in out
    assert not Path("runs").exists()


def test_no_text_of_a_user_is_read_as_shell(tmp_path):
    bad = """'; touch pwned; "$(touch pwned)" `touch pwned` \\ # &"""
    work = torchrun.Work(config=tmp_path / bad, told=tmp_path / bad, log=Path("/dev/null"))
    text = torchrun.script([work], hosts=[bad, "b"], devices=1, workdir=tmp_path)
    python = re.search(r"(\S+) -u -m torch\.distributed\.run", text)[1]
    body = text.replace(python, "show")
    shown = 'show() { printf "%s\\n" "$HHBENCH_RESULT_PATH" "$@" >&3; }\n'
    said = subprocess.run(
        ["bash", "-c", f"exec 3>&1\n{shown}{body}", "x", "1"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[0] == f"{tmp_path}/{bad}"
    assert f"--master-addr={bad}" in said
    assert "--node-rank=1" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number,left", [("0", []), ("1", ["told.failed"])])
def test_the_first_machine_removes_what_an_earlier_start_said(number, left, tmp_path):
    (tmp_path / "told.failed").write_text("of the start before")
    work = torchrun.Work(config=tmp_path / "config", told=tmp_path / "told", log=Path("/dev/null"))
    text = torchrun.script([work], hosts=["a", "b"], devices=1, workdir=tmp_path)
    python = re.search(r"(\S+) -u -m torch\.distributed\.run", text)[1]
    body = "show() { true; }\n" + text.replace(python, "show")
    subprocess.run(["bash", "-c", body, "x", number], check=True)
    assert [path.name for path in tmp_path.iterdir()] == left


@pytest.mark.slow
def test_torchrun_goes_on_when_a_trial_fails_and_says_so(call, tmp_path):
    """Really run: one trial of two can't be."""
    Path("fails.py").write_text(
        "from hhbench.attention import FeatureMap\n\n\nclass Fails(FeatureMap):\n    def forward(self, x):\n"
        "        if self.training and x.requires_grad:\n            raise RuntimeError('bound to happen')\n"
        "        return x.relu() + 1\n"
    )
    code, out, _ = call("submit", "--on", "torchrun", *TINY, "--attn", "fails.py:Fails,elu")
    assert code == 1
    assert "submission: " in out
    submission = submit.find_submission(Path("runs"), None)
    trials = submit.progress(submission)
    assert [trial.word for trial in trials] == ["failed", "done"]
    assert "bound to happen" in trials[0].note
    assert "bound to happen" in submission.log(0).read_text()
    code, out, _ = call("collect", "--to", "kept")
    assert code == 1
    assert "copied 1 of 2 results" in out
    assert len(result.find(Path("kept"))[0]) == 1
    code, out, err = call("cancel")
    assert code == 2
    assert "Ctrl-C" in err


# ---- how far it is ---------------------------------------------------------------------------------------------


def test_status_by_the_files_that_trials_leave(call, done):
    submission = written(trials=4, teachers=1)
    (path,) = done.rglob("result.json")
    submission.told(0).write_text(f"{path}\n")
    submission.told(1).with_name("0001.failed").write_text("it was\nnot to be\n")
    submission.told(3).write_text("/nowhere/result.json")
    (submission.folder / "results" / "teacher-0000.failed").write_text("NaN at step 3\n")
    trials = submit.progress(submission)
    assert [trial.word for trial in trials] == ["done", "failed", "pending", "stopped"]
    assert trials[1].note == "it was not to be"
    assert "/nowhere/result.json" in trials[3].note
    code, out, _ = call("status")
    assert code == 0
    assert "4 trials: 1 done, 1 failed, 1 pending, 1 stopped" in out
    assert "the shared teacher of teacher 0 failed: NaN at step 3" in out


def test_a_trial_that_runs_again_is_not_called_failed():
    submission = written(on="slurm", trials=1)
    submission.told(0).with_name("0000.failed").write_text("of the first start")

    def word(state: str) -> submit.Word:
        standing = slurm.Standing(7, state, "Priority")
        return submit._progress(submission, 0, submission.record.trials[0], standing).word

    assert word("RUNNING") == "running"
    assert word("PENDING") == "pending"
    assert word("TIMEOUT") == "failed"  # the file says why
    submission.told(0).with_name("0000.failed").unlink()
    assert word("TIMEOUT") == "stopped"
    assert word("CANCELLED") == "stopped"
    assert word("OUT_OF_MEMORY") == "failed"
    submission.told(0).with_name("0000.stopped").write_text("stopped by a signal after step 3")
    assert word("FAILED") == "stopped"
    assert word("PENDING") == "pending"


def test_a_submission_is_found_by_its_folder_its_id_or_the_start_of_it():
    first, second = written(), written()
    assert submit.find_submission(Path("runs"), None).id == second.id
    assert submit.find_submission(Path("runs"), first.id).id == first.id
    assert submit.find_submission(Path("runs"), first.id[:-7]).id == first.id
    assert submit.find_submission(Path("elsewhere"), str(first.folder)).id == first.id
    with pytest.raises(UsageError, match="begins 2 submissions"):
        submit.find_submission(Path("runs"), "2026")
    with pytest.raises(UsageError, match="Did you mean"):
        submit.find_submission(Path("runs"), first.id.replace("abc", "abd"))
    with pytest.raises(UsageError, match="no submission below elsewhere"):
        submit.find_submission(Path("elsewhere"), None)


@pytest.mark.parametrize(
    "change", [{"trials": [{"name": "../x", "title": ""}]}, {"trials": [{"name": ".x", "title": ""}]}, {"nodes": "2"}]
)
def test_a_record_that_was_tampered_with_is_refused(change):
    submission = written()
    path = submission.folder / submit.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HHBenchError, match=re.escape(str(path))):
        submit.find_submission(Path("runs"), None)
    path.write_text('{"schema": 1, "on')
    with pytest.raises(HHBenchError, match="can't be read"):
        submit.find_submission(Path("runs"), None)


def test_only_whole_results_are_collected(done):
    submission = written(trials=2)
    (path,) = done.rglob("result.json")
    changed = json.loads(path.read_text())
    changed["identity"]["settings"]["seed"] = 5
    Path("changed.json").write_text(json.dumps(changed))
    submission.told(0).write_text(str(path))
    submission.told(1).write_text(str(Path("changed.json").absolute()))
    trials = submit.progress(submission)
    assert [trial.word for trial in trials] == ["done", "stopped"]
    assert "it was changed after it was written" in trials[1].note
    assert [path.name for path in submit.collect(trials, Path("kept"))] == ["trial-0.result.json"]
