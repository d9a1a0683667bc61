"""What `hhbench profile` measures: the request, the check before timing, the rounds, whole models and tasks."""

import dataclasses
import json
import random

import pytest
import torch

from hhbench.attention import MixerShape, build_attention
from hhbench.cli import main
from hhbench.errors import UsageError
from hhbench.profile import clock, measure, record
from hhbench.profile.clock import Clock, Moment, Timed, device_of, inspect
from hhbench.profile.correctness import complaint
from hhbench.profile.measure import plan, profile
from hhbench.profile.request import Request, labels_of, lengths_of
from hhbench.profile.subjects import Workload
from hhbench.task import TASKS

OWN = """
import torch
from hhbench.attention import Attention, register_attention

class Mean(Attention):
    "The mean of the values so far."
    factor = 1.0
    def weights(self, q, k, *, key_mask=None, positions=None):
        N, M = q.shape[2], k.shape[2]
        seen = torch.ones(N, M, dtype=q.dtype, device=q.device).tril(M - N)
        return (seen / seen.sum(-1, keepdim=True)).expand(*q.shape[:2], N, M)
    def forward(self, q, k, v, *, key_mask=None, positions=None):
        return self.factor * self.quadratic(q, k, v) + 0 * q

class Wrong(Mean):
    factor = 1.01

@register_attention(paper="mine", cost="N", directions=("causal",))
class Causal(Mean):
    pass

class Fails(Mean):
    def forward(self, q, k, v, *, key_mask=None, positions=None):
        raise NotImplementedError("no such operation")

class Hungry(Mean):
    def forward(self, q, k, v, *, key_mask=None, positions=None):
        if not 100 < q.shape[2] < 300:  # the check's own length
            torch.empty(2**50 if q.shape[2] > 16 else 1)
        return super().forward(q, k, v)
"""
SMALL = {"heads": 2, "head_dim": 8, "rounds": 2, "threads": 1, "device": "cpu"}
SHAPE = MixerShape(dim=16, num_heads=2, num_kv_heads=2, head_dim=8, scale=8**-0.5, max_len=512, causal=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


def measured(*attentions, **settings):
    return profile(Request(attentions=("softmax", *attentions), **{"lengths": (16, 32), **SMALL, **settings}))


# --- the request ---


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("256:2048", (256, 512, 1024, 2048)),
        ("100:350", (100, 200, 350)),  # the last is among them though no doubling reaches it
        ("64:64", (64,)),
        ("197,128", (128, 197)),
        ("8:16,100", (8, 16, 100)),
    ],
)
def test_lengths(text, lengths):
    assert lengths_of(text) == lengths


@pytest.mark.parametrize("text", ["", "a", "8:4", "0:8", "8:16:32", "8-16", "-8"])
def test_lengths_that_cannot_be(text):
    with pytest.raises(UsageError, match="--lengths"):
        lengths_of(text)


def test_labels_put_softmax_first_and_keep_options_together():
    assert labels_of("taylor[project_to=16,tie_qk=true], elu,elu", list) == (
        "softmax", "taylor[project_to=16,tie_qk=true]", "elu",
    )  # fmt: skip
    assert labels_of("all", lambda: ["elu", "softmax"]) == ("softmax", "elu")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"modes": ("trian",)}, "'train'"),
        ({"dtypes": ("bfloat",)}, "'bfloat16'"),
        ({"rounds": 0}, "--rounds"),
        ({"seconds": 0.0}, "--budget"),
        ({"lengths": ()}, "--lengths"),
        ({"causal": False, "modes": ("decode",)}, "bidirectional"),
        ({"task": "glue", "model": "minilm"}, "one at a time"),
        ({"task": "glue", "modes": ("decode",)}, "training step"),
    ],
)
def test_a_request_that_cannot_be(wrong, says):
    with pytest.raises(UsageError, match=says):
        Request(**{"attentions": ("softmax",), "lengths": (16,)} | wrong)


def test_a_plan_names_what_is_misspelt():
    for wrong, says in (("hedgehgo", "hedgehog"), ("taylor[project=3]", "project_to")):
        with pytest.raises(UsageError, match=f"Did you mean '{says}'"):
            plan(Request(attentions=("softmax", wrong), lengths=(16,)))
    with pytest.raises(UsageError, match="Did you mean 'cpu'"):
        device_of("cpuu")


# --- clock, memory and work ---


def test_the_clock_depends_on_the_threads():
    cpu = torch.device("cpu")
    assert Clock(cpu, 1).name != Clock(cpu, 2).name
    calls = []
    timed = Clock(cpu, 1).time(lambda: calls.append(torch.randn(100).sum()), 7)
    assert len(calls) == 7
    assert 0 < timed.seconds <= timed.wall * 1.01 + 1e-4


def test_attentions_at_one_place_take_their_turns_one_after_the_other():
    entries = [
        measure._Entry(label, work, "float32", length)
        for label in ("softmax", "hedgehog", "elu")
        for work in ("prefill", "train")
        for length in (128, 256, 512)
    ]
    order = random.Random(0)
    drawn = [measure._in_turns(entries, order) for _ in range(3)]
    for found in drawn:
        assert sorted(map(id, found)) == sorted(map(id, entries))
        places = [(entry.work, entry.length) for entry in found]
        assert places[::3] == places[1::3] == places[2::3] and len(set(places[::3])) == 6
    assert len({tuple(map(id, found)) for found in drawn}) == 3


def test_calls_take_turns():
    order = []
    work = torch.randn(256, 256)

    def call(name):
        return lambda: (order.append(name), work @ work @ work @ work)

    samples = Clock(torch.device("cpu"), 1).interleaved({name: call(name) for name in "abc"}, 3)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(min(seconds) for seconds in samples.values()) > 0
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(turns) == "abcabcbabc"  # after the warm-up; the second round goes backwards


@pytest.fixture
def crossing(monkeypatch):
    """A request whose attention's time crosses softmax's between 16 and 32 tokens, nearer to 32."""
    of_softmax = {8: 2.0, 16: 1.5, 32: 0.5, 64: 0.2}

    def sample(self, run, repeats):
        label, length = run()
        ratio = 1.0 if label == "softmax" else of_softmax.get(length, 1.2 if length < 24 else 0.9)
        return Timed(ratio, ratio, False)

    def workload(self, label, work, dtype, length):
        return Workload(prepare=lambda: lambda: (label, length), tokens=length, flops=None, state_bytes=None)

    monkeypatch.setattr(measure.LayerSubject, "workload", workload)
    monkeypatch.setattr(Clock, "sample", sample)
    return Request(attentions=("softmax", "elu"), lengths=(8, 16, 32, 64), modes=("prefill",), **SMALL)


def test_a_crossover_is_looked_at_more_finely(crossing):
    """At three lengths between the two around it, by those that cross; tables don't hold them."""
    found = profile(crossing)
    between = [(cell.attention, cell.length, len(cell.rounds)) for cell in found.between]
    assert between == [(label, n, 2) for n in (19, 23, 27) for label in ("elu", "softmax")]
    assert {cell.length for cell in found.cells} == {8, 16, 32, 64}
    (stated,) = found.crossovers
    assert 23 < stated.length < 27, "doubling alone would say 22"
    assert record.Profile.from_dict(json.loads(found.as_line())).between == found.between


def test_nothing_more_is_timed_after_an_interrupt(crossing):
    def watch(done, total, title):
        if title.startswith("round 2:"):
            raise KeyboardInterrupt

    found = profile(crossing, watch)
    assert "interrupted in round 2 of 2" in found.warnings
    assert not found.between and len(found.crossovers) == 1


def test_slow_calls_are_in_few_rounds(monkeypatch):
    monkeypatch.setattr(clock, "SLOW", 0.0)
    calls = []
    samples = Clock(torch.device("cpu"), 1).interleaved({"a": lambda: calls.append(torch.randn(9).sum())}, 5)
    assert len(samples["a"]) == clock.ROUNDS_IF_SLOW
    monkeypatch.setattr(clock, "SLOW", 2.0)
    assert len(Clock(torch.device("cpu"), 1).interleaved({"a": lambda: None}, 5)["a"]) == 5


def test_a_cold_sample_is_one_call():
    calls = []
    Clock(torch.device("cpu"), 1, cold=True).interleaved({"a": lambda: calls.append(1)}, 5)
    assert len(calls) == 2 + 5  # two to warm up


def test_seconds_between_moments_add_up():
    start = Moment.now()
    torch.randn(300, 300) @ torch.randn(300, 300)
    took = Moment.now() - start
    assert 0 < took.thread <= took.process + 1e-4
    assert took.wall > 0
    assert Moment() + took == took


def test_a_call_is_watched():
    """Two tensors of 1 MiB at once, one product, and torch's softmax."""
    a, q = torch.randn(512, 512), torch.randn(1, 2, 32, 8)

    def run():
        b = a @ a
        b = b + 1
        return b, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    found = inspect(run, torch.device("cpu"))
    assert found.counted_flops == 2 * 512**3 + 2 * (2 * 2 * 32 * 32 * 8)
    assert 2 * 2**20 <= found.peak_bytes < 2.2 * 2**20
    assert [name for name in found.kernels if "flash" in name]


def test_a_module_that_recomputes_without_gradients_is_watched():
    """A custom backward pass calls a module on leaves under no_grad, where a record of modules would fail."""
    map_ = torch.nn.Linear(8, 8)

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return map_(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * map_(x).mean()

    x = torch.randn(4, 8, requires_grad=True)
    found = inspect(lambda: Recompute.apply(x).sum().backward(), torch.device("cpu"))
    assert found.counted_flops == 2 * (2 * 4 * 8 * 8)


# --- the check before timing ---


@pytest.mark.parametrize("name", ["softmax", "hedgehog", "aft", "h3", "hyena"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_may_be_timed(name, dtype):
    module = build_attention(name, SHAPE)
    assert complaint(module, dtype, gradients=True, decodes=True) == ("", True)


def test_what_is_wrong_is_not_timed(own):
    found = measured(f"{own}:Wrong", f"{own}:Mean", modes=("train", "prefill"))
    by_status = {cell.attention.rpartition(":")[2]: cell.status for cell in found.cells}
    assert by_status == {"softmax": record.MEASURED, "Mean": record.MEASURED, "Wrong": record.WRONG}
    wrong = [cell for cell in found.cells if cell.status == record.WRONG]
    assert len(wrong) == 4
    assert all("output is 1.0e-02" in cell.note and not cell.seconds for cell in wrong)


def test_what_fails_is_not_called_wrong(own):
    """As on a device that lacks an operation. The others are measured."""
    found = measured(f"{own}:Fails", f"{own}:Mean", modes=("train", "prefill"))
    cells = {cell.attention.rpartition(":")[2]: cell for cell in found.cells}
    assert {name: cell.status for name, cell in cells.items()} == {
        "softmax": record.MEASURED, "Mean": record.MEASURED, "Fails": record.FAILED,
    }  # fmt: skip
    assert cells["Fails"].note.startswith("its check failed: ")
    assert "no such operation" in cells["Fails"].note


def test_a_wrong_gradient_and_a_wrong_step_are_found():
    from hhbench.attention import Attention

    class Detached(Attention):
        def weights(self, q, k, *, key_mask=None, positions=None):
            return (q @ k.mT).masked_fill(~torch.ones(q.shape[2], k.shape[2]).bool().tril(), -torch.inf).softmax(-1)

        def forward(self, q, k, v, *, key_mask=None, positions=None):
            return self.quadratic(q.detach() + 0 * q, k, v) if q.shape[2] == k.shape[2] else v[:, :, -1:] * 1.0

    said, _ = complaint(Detached(SHAPE), torch.float32, gradients=True, decodes=False)
    assert said.startswith("gradient of q")
    said, _ = complaint(Detached(SHAPE), torch.float32, gradients=False, decodes=True)
    assert said.startswith("decoded token")


# --- measuring ---


def test_a_layer_is_measured():
    before = torch.get_num_threads()
    found = measured("hedgehog", "hyena", lengths=(16, 64))
    assert torch.get_num_threads() == before
    works = ("train", "prefill", "first token", "token")
    assert [cell.place for cell in found.cells if cell.attention == "hedgehog"] == [
        ("hedgehog", work, "float32", n) for n in (16, 64) for work in works
    ]
    assert {cell.status for cell in found.cells} == {record.MEASURED}
    for cell in found.cells:
        assert cell.rounds == [0, 1]
        assert cell.p10 <= cell.p50 <= cell.p90
        assert cell.tokens == (1 if cell.work == "token" else cell.length)
        assert cell.tokens_per_s == pytest.approx(cell.tokens / cell.p50)
    shape = dataclasses.replace(SHAPE, max_len=64 + 64)
    attention = build_attention("hedgehog", shape)
    stated = attention.flops(64, 64)
    assert found.find("hedgehog", "prefill", "float32", 64).flops == stated
    assert found.find("hedgehog", "train", "float32", 64).flops == 3 * stated
    assert found.find("hedgehog", "token", "float32", 64).flops == attention.flops(1, 65)
    states = [found.find("hedgehog", "token", "float32", n).state_bytes for n in (16, 64)]
    assert states == [attention.state_bytes(64)] * 2
    assert found.find("softmax", "token", "float32", 64).state_bytes == 64 * 2 * 8 * 2 * 4
    assert "no state" in found.find("hyena", "token", "float32", 64).note
    assert any("flash" in name for name in found.find("softmax", "prefill", "float32", 64).kernels)
    ceiling = found.ceilings[0].flops_per_s
    cell = found.find("hedgehog", "prefill", "float32", 16)
    assert cell.mfu == pytest.approx(cell.flops / cell.p50 / ceiling)
    assert {(c.attention, c.work) for c in found.crossovers} == {(a, w) for a in ("hedgehog", "hyena") for w in works}


def test_a_prefill_is_the_first_token_where_no_state_is_kept():
    found = measured(modes=("prefill", "decode"), lengths=(16,))
    prefill, first = (found.find("softmax", work, "float32", 16) for work in ("prefill", "first token"))
    assert first.seconds == prefill.seconds
    alone = measured(modes=("decode",), lengths=(16,))
    assert alone.find("softmax", "first token", "float32", 16).measured


def test_half_precision_and_its_ceiling():
    found = measured("elu", dtypes=("float32", "bfloat16"), modes=("train",), lengths=(16,))
    assert [(c.attention, c.dtype, c.status) for c in found.cells] == [
        (name, dtype, "measured") for name in ("softmax", "elu") for dtype in ("float32", "bfloat16")
    ]
    assert [ceiling.dtype for ceiling in found.ceilings] == ["float32", "bfloat16"]


@pytest.mark.parametrize("attn,share", [("softmax", 0.5), ("hedgehog", 1.0), ("softmax-window[window=8]", None)])
def test_keys_and_values_are_kept_in_their_own_type_and_sums_in_float32(attn, share):
    found = measured(attn, dtypes=("float32", "bfloat16"), modes=("decode",), lengths=(16,))
    full, half = (found.find(attn, "token", dtype, 16).state_bytes for dtype in ("float32", "bfloat16"))
    assert half == share * full if share else full / 2 <= half < 0.6 * full  # beside keys and values: where they stand


def test_what_would_not_fit_into_the_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 16 * 2**20)  # not every system tells
    found = measured("elu", modes=("prefill",), lengths=(16,), batch_size=2**16)
    assert {(cell.status, cell.note.partition(":")[0]) for cell in found.cells} == {(record.NOT_RUN, "memory")}


def test_a_direction_that_is_not_served_says_so(own):
    found = measured(f"{own}:Causal", causal=False)
    cells = [cell for cell in found.cells if cell.attention != "softmax"]
    assert [(c.work, c.length) for c in cells] == [("train", 16), ("prefill", 16), ("train", 32), ("prefill", 32)]
    assert all(cell.status == record.UNSUPPORTED and "no bidirectional form" in cell.note for cell in cells)
    assert all(cell.state_bytes is None for cell in found.cells)


def test_what_runs_out_of_memory_says_so_and_is_not_tried_longer(own):
    found = measured(f"{own}:Hungry", modes=("prefill",), lengths=(16, 32, 64))
    status = {cell.length: (cell.status, cell.note) for cell in found.cells if cell.attention != "softmax"}
    assert status[16][0] == record.MEASURED
    assert status[32] == (record.NO_MEMORY, "at 32 tokens")
    assert status[64] == (record.NOT_RUN, "memory: it ran out at 32 tokens")


def test_what_does_not_fit_into_the_budget_is_not_run():
    found = measured("elu", seconds=1e-3)
    assert {cell.status for cell in found.cells} == {record.NOT_RUN}
    assert all(cell.note.startswith("budget") and not cell.seconds for cell in found.cells)
    assert found.crossovers == []


# --- whole models and tasks ---


def test_a_model_is_measured():
    found = measured("hedgehog", "hyena", model="gpt2-1x16x2")
    assert {cell.status for cell in found.cells} == {record.MEASURED}
    assert found.settings["model"] == "gpt2-1x16x2"
    hedgehog, softmax = (found.find(name, "token", "float32", 32) for name in ("hedgehog", "softmax"))
    assert hedgehog.state_bytes == found.find("hedgehog", "token", "float32", 16).state_bytes
    assert softmax.state_bytes == 2 * found.find("softmax", "token", "float32", 16).state_bytes
    assert "no state" in found.find("hyena", "token", "float32", 32).note
    # Two for each weight of the block's matrices, twelve widths squared, and of the head for one token; the attention.
    attention = build_attention("hedgehog", dataclasses.replace(SHAPE, max_len=96))
    stated = found.find("hedgehog", "prefill", "float32", 32).flops
    assert stated == 2 * (12 * 16 * 16 * 32 + 1024 * 16) + attention.flops(32, 32)


def test_a_task_is_measured():
    """The digits need no download."""
    found = measured("elu", task="imagenet", lengths=(), batch_size=4)
    assert [(c.attention, c.work, c.length, c.status) for c in found.cells] == [
        (name, "train", 64, "measured") for name in ("softmax", "elu")
    ]
    assert found.cells[0].tokens == 4 * 64
    for cell in found.cells:  # what the model states, of padded batches, and what torch counts
        assert cell.flops == pytest.approx(cell.counted_flops, rel=0.15)
        assert cell.mfu == pytest.approx(cell.flops / cell.p50 / found.ceilings[0].flops_per_s)
    assert found.subject["facts"]["dataset"] == TASKS.get("imagenet").build().suites["mini"][0]


def test_missing_data_name_the_command_that_fetches_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "empty"))
    assert main(["profile", "--attn", "elu", "--task", "glue"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "hhbench data fetch" in err


# --- the command ---

COMMAND = ["profile", "--heads", "2", "--head-dim", "8", "--lengths", "16:32", "--rounds", "3", "--threads", "1",
           "--device", "cpu", "--mode", "prefill"]  # fmt: skip


def test_the_command_ends_with_its_document_and_keeps_it(tmp_path, capsys):
    assert main([*COMMAND, "--attn", "taylor[project_to=4]", "--out", str(tmp_path), "--plots", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    (kept,) = tmp_path.rglob("profile.json")
    assert json.loads(kept.read_text()) == document
    assert lines[-2] == f"profile: {kept}"
    rows = [line.split()[:2] for line in lines if line.startswith(("softmax ", "taylor[project_to=4] "))]
    assert rows[:3] == [["softmax", "16"], ["softmax", "32"], ["taylor[project_to=4]", "16"]]
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"time", "tokens", "speedup", "crossover", "memory", "flops"}


def test_the_command_compares_with_an_older_one(tmp_path, capsys):
    assert main([*COMMAND, "--attn", "elu", "--out", str(tmp_path)]) == 0
    out = tmp_path / "older.json"
    out.write_text(capsys.readouterr().out)  # all that was printed: the last line is read
    document = json.loads(out.read_text().splitlines()[-1])
    for cell in document["cells"]:
        if cell["attention"] == "elu":
            cell["seconds"] = [0.02 * s for s in cell["seconds"]]
    out.write_text(json.dumps(document))
    assert main([*COMMAND, "--attn", "elu", "--out", str(tmp_path), "--against", str(out)]) == 1
    regressions = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REGRESSION")]
    assert len(regressions) == 2
    assert all("elu prefill float32" in line for line in regressions)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--attn", "elu", "--against", "broken.json"], 1, "broken.json: not whole JSON"),
        (["--attn", "elu", "--against", "absent.json"], 1, "absent.json: No such file"),
        (["--attn", "elu", "--task", "glue"], 2, "--heads is of a single layer"),
        (["--attn", "elu", "--mode", "trian"], 2, "Did you mean 'train'"),
        (["--attn", ","], 2, "--attn is empty"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('{"kind": "profile", ')
    assert main([*COMMAND, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_a_dry_run_measures_nothing(tmp_path, capsys):
    assert main([*COMMAND, "--attn", "elu", "--out", str(tmp_path), "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def interrupted_in(number):
    """A profile whose user presses Ctrl-C in this round."""

    def watch(done, total, title):
        if title.startswith(f"round {number}:"):
            raise KeyboardInterrupt

    return profile(Request(attentions=("softmax", "elu"), lengths=(16,), **SMALL | {"rounds": 3}), watch)


def test_an_interrupt_keeps_the_rounds_that_are_done():
    found = interrupted_in(3)
    assert "interrupted in round 3 of 3" in found.warnings
    assert {len(cell.seconds) for cell in found.cells if cell.work == "prefill"} == {2}
    with pytest.raises(KeyboardInterrupt):
        interrupted_in(1)


def test_an_unknown_task_is_refused_before_a_plan_is_made():
    with pytest.raises(UsageError, match="glue"):
        plan(Request(attentions=("softmax",), task="gleu", lengths=()))
