"""The fidelity report: every column against arithmetic done here, what takes part in it, and the command."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from scipy.stats import spearmanr
from test_distill import make_host, make_inputs
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from hhbench import hosts, models
from hhbench.attention import Attention, MixerShape, build_attention
from hhbench.cli import main
from hhbench.config import RunConfig
from hhbench.errors import HHBenchError, UsageError
from hhbench.fidelity import folder as fidelity_folder
from hhbench.fidelity import measures as fidelity
from hhbench.fidelity.measures import MEASURES, FidelityReport, LayerReport, measure
from hhbench.hosts import AttentionSlot, Placement
from hhbench.hosts.slots import SLOT
from hhbench.runner import prepare
from hhbench.task import TASKS


class Bare(nn.Module):
    """A host of one layer that takes q, k and v as they come."""

    def __init__(self, attention: Attention, name: str = "given") -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.layer = nn.Module()
        self.layer.add_module(SLOT, AttentionSlot(attention, Placement("layer", name, {}, attention.shape)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return getattr(self.layer, SLOT)(q, k, v, key_mask)


class Given(Attention):
    """Weights that were written down."""

    def __init__(self, shape: MixerShape, rows: Tensor) -> None:
        super().__init__(shape)
        self.rows = rows

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask=None, positions=None) -> Tensor:
        return self.quadratic(q, k, v, key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor, *, key_mask=None, positions=None) -> Tensor:
        return self.rows.expand(*q.shape[:2], -1, -1)


def shape_of(heads: int, width: int, *, scale: float, length: int, causal: bool = False) -> MixerShape:
    return MixerShape(
        dim=heads * width, num_heads=heads, num_kv_heads=heads, head_dim=width, scale=scale, max_len=length,
        causal=causal,
    )  # fmt: skip


def column(layer: LayerReport, name: str = "local") -> dict[str, Any]:
    return dataclasses.asdict(getattr(layer, name))


def close(first: FidelityReport, second: FidelityReport, *, within: float = 1e-6) -> bool:
    """Every number of two reports."""
    pairs = [
        (a, b)
        for one, other in zip(first.layers, second.layers, strict=True)
        for name in ("local", "end_to_end")
        if getattr(one, name) is not None
        for measured in MEASURES
        for a, b in zip(column(one, name)[measured], column(other, name)[measured], strict=True)
    ]
    return bool(pairs) and all(a == pytest.approx(b, abs=within) for a, b in pairs)


def with_teacher(family: str, attn: str, layers: int = 3, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A student, and the softmax model with the same weights."""
    student = make_host(family, layers, attn, **options)
    teacher = make_host(family, layers, "softmax")
    missing = teacher.load_state_dict(
        {name: x for name, x in student.state_dict().items() if SLOT not in name}, strict=False
    )
    assert not missing.missing_keys and not missing.unexpected_keys
    return student, teacher


# --- the columns ---


def test_three_tokens_by_hand():
    # One head, scale 1, q = (1, 1, -1), k = (0, log 2, log 3): softmax weighs by 1, 2, 3 and by 1, 1/2, 1/3.
    #   query 0: softmax 1/6, 2/6, 3/6; given 1/6, 3/6, 2/6
    #     kl = 2/6 log(2/3) + 3/6 log(3/2) = 1/6 log(3/2)
    #     given's ranks 0, 2, 1 for 0, 1, 2: Spearman 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 1/2
    #     from key 0 to 1 it rises, from key 1 to 2 it falls: 1/2
    #     half of three keys is one; softmax's first is key 2, given's is key 1: 0
    #     v is the identity, outputs are the weights: (1 + 6 + 6) / (1 + 4 + 9) = 13/14
    #   query 1: the same softmax; given 3/6, 2/6, 1/6
    #     kl = 1/6 log(1/3) + 3/6 log(3) = 1/3 log 3; Spearman -1; both pairs fall; overlap 0; cosine 10/14
    #   query 2: softmax 6/11, 3/11, 2/11; given the same: 0, 1, 0, 1, 1
    q, k = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 3.0]).log()
    rows = torch.tensor([[1 / 6, 3 / 6, 2 / 6], [3 / 6, 2 / 6, 1 / 6], [6 / 11, 3 / 11, 2 / 11]])
    inputs = {"q": q.view(1, 1, 3, 1), "k": k.view(1, 1, 3, 1), "v": torch.eye(3).view(1, 1, 3, 3)}
    shape = shape_of(1, 1, scale=1.0, length=3)
    student, teacher = Bare(Given(shape, rows)), Bare(build_attention("softmax", shape), "softmax")
    report = measure(student, [inputs], teacher=teacher)
    sixths = math.log(6) - 2 / 6 * math.log(2) - 3 / 6 * math.log(3)  # entropy of 1/6, 2/6, 3/6 in any order
    elevenths = math.log(11) - 6 / 11 * math.log(6) - 3 / 11 * math.log(3) - 2 / 11 * math.log(2)
    expected = {
        "kl": (math.log(1.5) / 6 + math.log(3) / 3 + 0) / 3,
        "teacher_entropy": (2 * sixths + elevenths) / 3,
        "student_entropy": (2 * sixths + elevenths) / 3,
        "spearman": (0.5 - 1 + 1) / 3,
        "violations": (0.5 + 1 + 0) / 3,
        "overlap": (0 + 0 + 1) / 3,
        "cosine": (13 / 14 + 10 / 14 + 1) / 3,
    }
    assert report.queries == 3
    for name in ("local", "end_to_end"):
        assert column(report.layers[0], name) == {m: [pytest.approx(expected[m], abs=1e-6)] for m in MEASURES}


def test_queries_without_an_order_are_left_out_and_even_weights_have_none():
    #   query 0: q = 0: no key is above another, so no order is asked for
    #   query 1: q = 1 with even weights: Spearman 0, and nothing falls
    shape = shape_of(1, 1, scale=1.0, length=2)
    inputs = {
        "q": torch.tensor([0.0, 1.0]).view(1, 1, 2, 1),
        "k": torch.tensor([0.0, 1.0]).view(1, 1, 2, 1),
        "v": torch.eye(2).view(1, 1, 2, 2),
    }
    student = Bare(Given(shape, torch.full((2, 2), 0.5)))
    found = column(measure(student, [inputs]).layers[0])
    assert found["spearman"] == found["violations"] == [0.0]
    alone = {name: x[:, :, :1] if name == "v" else x[:, :, :1, :] for name, x in inputs.items()}
    found = column(measure(Bare(Given(shape, torch.ones(1, 1))), [alone]).layers[0])
    assert (found["spearman"], found["violations"], found["overlap"]) == ([None], [None], [None])
    assert found["kl"] == [0.0]


def test_the_overlap_compares_k_keys_but_no_more_than_half():
    shape = shape_of(1, 1, scale=1.0, length=8)
    k = torch.arange(8.0).view(1, 1, 8, 1)
    inputs = {"q": torch.ones(1, 1, 8, 1), "k": k, "v": torch.eye(8).view(1, 1, 8, 8)}
    # Ranked by given's weights, best first: keys 7, 0, 6, 5, ...; by softmax's 7, 6, 5, 4.
    rows = torch.tensor([7.0, 1, 2, 3, 4, 5, 6, 8]).expand(8, 8) / 36
    shares = [column(measure(Bare(Given(shape, rows)), [inputs], top_k=n).layers[0])["overlap"] for n in (1, 2, 3, 99)]
    assert shares == [[1.0], [0.5], [pytest.approx(2 / 3)], [0.75]]


def test_ranks_are_scipy_s():
    torch.manual_seed(0)
    scores = torch.randn(40, 13, dtype=torch.float64)
    weights = torch.rand(40, 13, dtype=torch.float64)
    scores[10:], weights[20:] = (scores[10:] * 2).round(), (weights[20:] * 4).round()  # ties in one, then in both
    visible = torch.rand(40, 13) < 0.8
    found, _, ordered = fidelity._order(scores, weights, visible)
    for i in range(40):
        x, y = scores[i][visible[i]].numpy(), weights[i][visible[i]].numpy()
        assert bool(ordered[i]) == (len(set(x)) > 1)
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert float(found[i]) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


# --- the Gaussian numbers of the maps ---

WIDTH, TOKENS, HEADS = 64, 200, 8


def _softmaxed(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _features(kernel: Any) -> Any:
    return lambda q, k, attention: kernel(q) @ kernel(k).swapaxes(-1, -2)


def _favor(q: np.ndarray, k: np.ndarray, attention: Any) -> np.ndarray:
    rows = attention.query_map.projection.double().numpy()

    def phi(x: np.ndarray) -> np.ndarray:
        x = x / WIDTH**0.25
        return np.exp(x @ rows.T - (x**2).sum(-1, keepdims=True) / 2)

    return phi(q) @ phi(k).swapaxes(-1, -2)


def _reweighted(q: np.ndarray, k: np.ndarray, attention: Any) -> np.ndarray:
    i = np.arange(TOKENS)
    relu = np.maximum(q, 0) @ np.maximum(k, 0).swapaxes(-1, -2)
    return relu * np.cos(np.pi * (i[:, None] - i) / (2 * TOKENS))


def _taylor(q: np.ndarray, k: np.ndarray, attention: Any) -> np.ndarray:
    z = q @ k.swapaxes(-1, -2) / 8
    return 1 + z + z**2 / 2


# name, options, phi(q).phi(k) by its formula; entropy, KL and Spearman as they are known of one draw, and within what
GAUSSIAN = [
    ("hedgehog", {}, _features(lambda x: np.concatenate([_softmaxed(x), _softmaxed(-x)], -1)), 5.288, 0.387, 0.873),
    ("hedgehog", {"activation": "exp"}, _features(lambda x: np.exp(np.concatenate([x, -x], -1))), 5.284, 0.381, 0.747),
    ("exp", {}, _features(np.exp), 5.269, 0.398, 0.494),
    ("exp", {"temperature": 2.0}, _features(lambda x: np.exp(2 * x)), 4.719, 0.575, 0.442),
    ("elu", {}, _features(lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))), 5.293, 0.444, 0.501),
    ("relu", {}, _features(lambda x: np.maximum(x, 0)), 5.244, 0.352, 0.581),
    ("t2r", {}, _features(lambda x: np.maximum(x, 0)), 5.244, 0.352, 0.581),
    ("taylor", {}, _taylor, 5.041, 0.062, 0.900),
    ("cosformer", {}, _reweighted, None, None, None),
    ("performer", {}, _favor, None, None, None),
]


@pytest.mark.parametrize(
    "name,options,kernel,entropy,kl,spearman", GAUSSIAN, ids=[f"{n}{o or ''}" for n, o, *_ in GAUSSIAN]
)
def test_the_gaussian_numbers_of_the_maps(name, options, kernel, entropy, kl, spearman):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, WIDTH, dtype=torch.float64)
    attention = build_attention(name, shape_of(HEADS, WIDTH, scale=1 / 8, length=TOKENS), **options)
    found = column(measure(Bare(attention), [{"q": q, "k": k, "v": v}]).layers[0])
    scores = kernel(q[0].numpy(), k[0].numpy(), attention)
    s = scores / scores.sum(-1, keepdims=True)
    z = (q[0] @ k[0].mT / 8).numpy()
    t = _softmaxed(z)
    order = z.argsort(-1)
    in_order = np.take_along_axis(s, order, -1)
    falls = np.diff(in_order, axis=-1) < -1e-6 * in_order[..., :-1]  # Taylor's minimum is flat
    top = [[set(row[-10:]) for row in x.argsort(-1).reshape(-1, TOKENS)] for x in (t, s)]
    shared = np.array([len(a & b) / 10 for a, b in zip(*top, strict=True)]).reshape(HEADS, TOKENS)
    ours, theirs = s @ v[0].numpy(), t @ v[0].numpy()
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    expected = {
        "kl": (t * np.log(t / s)).sum(-1),
        "teacher_entropy": -(t * np.log(t)).sum(-1),
        "student_entropy": -(s * np.log(s)).sum(-1),
        "spearman": np.array(
            [[spearmanr(a, b).statistic for a, b in zip(z[h], s[h], strict=True)] for h in range(HEADS)]
        ),
        "violations": falls.mean(-1),
        "overlap": shared,
        "cosine": (ours * theirs).sum(-1) / norms,
    }
    for measured in MEASURES:
        assert found[measured] == pytest.approx(expected[measured].mean(-1).tolist(), abs=1e-4), measured
    if entropy is not None:
        within = 0.1 if options.get("temperature") else 0.03
        assert np.mean(found["student_entropy"]) == pytest.approx(entropy, abs=within)
        assert np.mean(found["kl"]) == pytest.approx(kl, abs=within)
        assert np.mean(found["spearman"]) == pytest.approx(spearman, abs=within)


# --- what takes part ---


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_softmax_against_itself_lacks_nothing(family):
    model, teacher = with_teacher(family, "softmax")
    for mask in ("all", "right", "left"):
        report = measure(model, [make_inputs(mask)], teacher=teacher)
        for layer in report.layers:
            assert layer.kept
            for name in ("local", "end_to_end"):
                found = column(layer, name)
                assert found["kl"] == found["violations"] == [0.0] * 4
                assert found["teacher_entropy"] == found["student_entropy"]
                assert found["overlap"] == [1.0] * 4
                assert found["cosine"] == found["spearman"] == [pytest.approx(1.0, abs=1e-9)] * 4
        assert report.mean("local", "kl") is None  # nothing was converted


def test_a_layer_that_kept_its_window_is_its_own_teacher():
    config = tf.MistralConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, sliding_window=3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = hosts.convert(tf.MistralForCausalLM(config), "softmax")
    report = measure(model, [make_inputs("all")], teacher=copy.deepcopy(model))
    for layer in report.layers:
        assert layer.kept and layer.attention == "softmax-window[window=3]"
        assert column(layer)["kl"] == column(layer, "end_to_end")["kl"] == [0.0] * 4
        assert max(column(layer)["teacher_entropy"]) <= math.log(3)


def test_a_window_that_was_asked_for_is_no_kept_softmax():
    report = measure(make_host("llama", 2, "softmax-window", window=3), [make_inputs("all")])
    assert not any(layer.kept for layer in report.layers)
    assert min(column(report.layers[0])["kl"]) > 1


def test_kept_layers_are_marked_and_take_no_part_in_the_mean():
    model = make_host("bert", 1, "softmax")
    config = model.config
    config.num_hidden_layers = 3
    model = hosts.convert(tf.BertForMaskedLM(config), "hedgehog", keep_layers=[1])
    report = measure(model, [make_inputs()])
    assert [layer.kept for layer in report.layers] == [False, True, False]
    assert column(report.layers[1])["kl"] == [0.0] * 4
    kls = [column(layer)["kl"] for layer in report.layers]
    assert report.mean("local", "kl") == pytest.approx(np.mean(kls[0] + kls[2]))
    _, rows = report.table()
    assert [row[1] for row in rows[:3]] == ["hedgehog", "softmax (kept)", "hedgehog"]
    assert rows[3][0] == "mean of 2 converted"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mask", ["right", "left"])
def test_padding_is_no_part_and_batches_add_up(family, mask):
    student, teacher = with_teacher(family, "hedgehog")
    inputs = make_inputs(mask)
    report = measure(student, [inputs], teacher=teacher)
    assert report.queries == int(inputs["attention_mask"].sum())
    alone = []  # every sequence by itself, without its padding
    for row in range(4):
        attended = inputs["attention_mask"][row].bool()
        one = {name: x[row : row + 1, attended] for name, x in inputs.items()}
        if family == "bert" and mask == "left":
            one["position_ids"] = inputs["position_ids"][row : row + 1, attended]
        alone.append(one)
    assert close(measure(student, alone, teacher=teacher), report, within=2e-5)
    other = inputs | {"input_ids": inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)}
    assert close(measure(student, [other], teacher=teacher), report, within=1e-9)
    halves = [{name: x[rows] for name, x in inputs.items()} for rows in (slice(0, 1), slice(1, 4))]
    assert close(measure(student, halves, teacher=teacher), report, within=2e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_end_to_end_sees_the_errors_of_earlier_layers_and_local_does_not(family):
    student, teacher = with_teacher(family, "hedgehog")
    report = measure(student, [make_inputs("right")], teacher=teacher)
    first, *later = report.layers
    assert column(first) == {m: pytest.approx(x, abs=1e-6) for m, x in column(first, "end_to_end").items()}
    for layer in later:
        local, end_to_end = column(layer), column(layer, "end_to_end")
        # Softmax is passed on in both, by the same weights: the teacher is the same, and nothing else is.
        same = [m for m in MEASURES if local[m] == pytest.approx(end_to_end[m], abs=1e-5)]
        assert same == ["teacher_entropy"]
        assert column(layer)["cosine"] > column(layer, "end_to_end")["cosine"]
    without = measure(student, [make_inputs("right")])
    assert all(layer.end_to_end is None for layer in without.layers)
    # A student whose first layer is off, and whose second one is softmax itself
    student = hosts.convert(copy.deepcopy(teacher), "hedgehog", keep_layers=[1, 2])
    report = measure(student, [make_inputs("right")], teacher=teacher)
    assert column(report.layers[1])["kl"] == [0.0] * 4
    assert min(column(report.layers[1], "end_to_end")["kl"]) > 1e-4


def test_what_finetuning_changed_is_end_to_end_alone():
    student, teacher = with_teacher("bert", "softmax", layers=1)
    with torch.no_grad():
        student.bert.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    (layer,) = measure(student, [make_inputs()], teacher=teacher).layers
    assert column(layer)["kl"] == [0.0] * 4
    assert min(column(layer, "end_to_end")["kl"]) > 1e-4


def test_without_weights_there_is_the_output_alone():
    for family in ("bert", "llama"):
        student, teacher = with_teacher(family, "aft", variant="simple")
        report = measure(student, [make_inputs()], teacher=teacher)
        for layer in report.layers:
            found = column(layer)
            assert [name for name, x in found.items() if x is not None] == ["cosine"]
            assert -1 <= min(found["cosine"]) <= max(found["cosine"]) < 1
        assert report.mean("local", "kl") is None
        assert report.table()[1][0][2] == "no weights"


def test_a_mixer_has_the_cosine_of_its_block_s_output():
    torch.manual_seed(0)
    teacher = make_host("bert", 2, "softmax")
    student = make_host("bert", 2, "h3")
    inputs = make_inputs()
    report = measure(student, [inputs], teacher=teacher)
    outputs: dict[str, list[Tensor]] = {}
    for model in (teacher, student):
        for layer in report.layers:
            model.get_submodule(layer.name).register_forward_hook(
                lambda module, args, out, name=layer.name: outputs.setdefault(name, []).append(out[0])
            )
        with torch.no_grad():
            model(**inputs)
    attended = inputs["attention_mask"].bool()
    for layer in report.layers:
        assert layer.local is None
        theirs, ours = (x[attended].double() for x in outputs[layer.name])
        cosine = float(torch.cosine_similarity(ours, theirs, dim=-1).mean())
        assert column(layer, "end_to_end")["cosine"] == [pytest.approx(cosine, abs=1e-6)]
        assert layer.end_to_end is not None and layer.end_to_end.kl is None
    assert report.table()[1][0][2] == "no softmax"


def test_half_precision_is_measured_without_rounding_weights_to_ties():
    student = make_host("llama", 2, "hedgehog").to(torch.bfloat16)
    found = measure(student, [make_inputs("all")])
    assert found.mean("local", "kl") == pytest.approx(
        measure(student.float(), [make_inputs("all")]).mean("local", "kl"), rel=0.5
    )


def test_models_are_left_as_they_were():
    student, teacher = with_teacher("bert", "hedgehog")
    student.train()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    done: list[int] = []
    measure(student, [make_inputs(), make_inputs()], teacher=teacher, watch=done.append)
    assert done == [1, 2]
    assert student.training and all(module.training for module in student.modules())
    assert all(slot.interceptor is None for slot in hosts.slots(student).values())
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items() if "floored" not in name)


def test_a_report_survives_json():
    student, teacher = with_teacher("bert", "hedgehog")
    report = measure(student, [make_inputs()], teacher=teacher)
    assert FidelityReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    headers, rows = report.table(heads=True)
    assert len(rows) == 3 * 4 + 1
    assert all(len(row) == len(headers) for row in rows)


def test_what_cannot_be_measured_is_said():
    student, teacher = with_teacher("bert", "hedgehog")
    with pytest.raises(HHBenchError, match="no batch"):
        measure(student, [])
    with pytest.raises(UsageError, match="convert it first"):
        measure(tf.BertModel(teacher.config), [make_inputs()])
    with pytest.raises(UsageError, match="top_k must be at least 1"):
        measure(student, [make_inputs()], top_k=0)
    with pytest.raises(UsageError, match="isn't the model"):
        measure(student, [make_inputs()], teacher=make_host("bert", 2, "softmax"))
    with torch.no_grad():
        teacher.bert.encoder.layer[1].attention.self.query.weight[0, 0] = torch.nan
    with pytest.raises(HHBenchError, match=r"layer.1.attention.self: .*teacher.* NaN"):
        measure(student, [make_inputs()], teacher=teacher)


# --- a folder, and the command ---


def make_text(path: Path, words: int, seed: int = 0) -> Path:
    known = ["the", "a", "cat", "dog", "runs", "sees", "over", "under", "house", "blue", "fast", "and", "or", "bird"]
    chosen = torch.randint(len(known), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = [" ".join(known[i] for i in chosen[start : start + 12]) for start in range(0, words, 12)]
    path.write_text("\n".join(lines))
    return path


def make_llama(folder: Path, text: Path) -> Path:
    """A pretrained model's folder: a Llama of random weights with a tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        text.read_text().splitlines(), vocab_size=290, special_tokens=["<s>"], show_progress=False
    )
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": 290, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 256, "bos_token_id": None,
        "eos_token_id": 0,
    }  # fmt: skip
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    return folder


def save_converted(folder: Path, **settings: Any) -> Path:
    """A folder as a conversion leaves it, of a model that was taught nothing."""
    config = prepare(RunConfig(task="lm", attn="hedgehog", **settings)).config
    task = TASKS.get("lm").build()
    data = task.load_data(config)
    torch.manual_seed(config.seed)
    model = hosts.convert(task.build_model(config, data), "hedgehog")
    run = {
        "config": config.as_dict(),
        "weights": task.weights(config),
        "data": dict(data.hashes),
        "teacher": None,
        "fidelity": {
            "kl_before": [0.5, 0.3], "kl_after": [0.2, 0.1], "teacher_entropy": [2.0, 2.0],
            "student_entropy_before": [2.5, 2.5], "student_entropy_after": [2.2, 2.2], "floored_rows": 0,
        },
    }  # fmt: skip
    processor = models.tokenizer(str(config.model)) if Path(str(config.model)).is_dir() else None
    models.save(model, folder, notes={"run": run}, processor=processor)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """`model`, converted from `llama` on `text.txt`, taught at 16 tokens."""
    home = tmp_path_factory.mktemp("converted")
    text = make_text(home / "text.txt", 6000)
    llama = make_llama(home / "llama", text)
    save_converted(home / "model", dataset=str(text), model=str(llama), regime="pretrained-conversion", max_len=16)
    return home


def test_the_command_reports_a_folder(converted, capsys, tmp_path):
    assert main(["fidelity", str(converted), "--examples", "12", "--plots", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama with hedgehog on text.txt: 12 test examples of up to 16 tokens, 192 queries\n")
    assert "local:" in out and "end-to-end:" in out and "local column alone" not in out
    assert "after the swap                  0.400" in out and "after transfer                  0.150" in out
    for name in ("heads", "entropy", "scatter", "lengths"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_before_transfer_the_maps_are_as_they_were_made(converted, tmp_path, capsys):
    taught = models.load(converted / "model")
    with torch.no_grad():
        for parameter in hosts.attention_parameters(taught):
            parameter.add_(torch.randn_like(parameter))
        taught.lm_head.weight.mul_(1.1)  # and finetuning changed the rest
    models.save(taught, tmp_path / "taught", notes={"run": models.manifest(converted / "model")["run"]})

    def layers(folder: Path, *flags: str) -> list[Any]:
        assert main(["fidelity", str(folder), "--examples", "4", "--lengths", "1", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["layers"]

    before = layers(tmp_path / "taught", "--before")
    assert before == layers(converted / "model")
    assert before != layers(tmp_path / "taught")


def test_the_command_s_json_has_everything(converted, capsys):
    assert main(["fidelity", str(converted / "model"), "--json", "--lengths", "1,64,128,9999", "--examples", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    subject = fidelity_folder.open_folder(converted / "model")
    batches = [batch["inputs"] for batch in fidelity_folder.batches_of(subject.data, 8)]
    report = measure(subject.student, batches, teacher=subject.teacher)
    assert FidelityReport.from_dict({name: found[name] for name in ("layers", "queries", "top_k")}) == report
    assert found["means"]["local"]["kl"] == report.mean("local", "kl")
    once, longer, skipped, absurd = found["lengths"]
    assert [(point["times"], point["length"], point["examples"]) for point in (once, longer)] == [
        (1, 16, 8),
        (64, 1024, 1),
    ]
    assert once["kl"] == pytest.approx(report.mean("local", "kl"))
    loss = count = 0.0
    for batch in fidelity_folder.batches_of(subject.data, 8):
        with torch.no_grad():
            logits = subject.student(**batch["inputs"]).logits.double()
        kept = batch["labels"] != -100
        loss -= float(logits.log_softmax(-1)[kept].gather(1, batch["labels"][kept][:, None]).sum())
        count += int(kept.sum())
    assert once["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert once["teacher_perplexity"] != once["perplexity"]
    assert longer["skipped"] is None and longer["perplexity"] > 1
    assert skipped["skipped"] == "the data have no example of more than 1024 tokens"
    assert absurd["kl"] is None and "shorter than one window" in absurd["skipped"]


def test_other_data_and_other_lengths(converted, capsys, tmp_path):
    other = make_text(tmp_path / "other.txt", 3000, seed=1)
    command = ["fidelity", str(converted), "--data", str(other), "--max-len", "24", "--lengths", "1", "--examples", "4"]
    assert main([*command, "--heads"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama with hedgehog on other.txt: 4 test examples of up to 24 tokens, 96 queries\n")
    assert sum(line.startswith(("0 ", "1 ")) for line in out.splitlines()) == 4


def test_a_teacher_that_changed_is_an_error_and_one_that_is_gone_is_said(converted, capsys, tmp_path):
    home = tmp_path / "home"
    llama = make_llama(home / "llama", converted / "text.txt")
    folder = save_converted(
        home / "model", dataset=str(converted / "text.txt"), model=str(llama), regime="pretrained-conversion",
        max_len=16,
    )  # fmt: skip
    command = ["fidelity", str(folder), "--lengths", "1", "--examples", "4"]
    state = tf.LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        state.model.norm.weight.mul_(1.01)
    state.save_pretrained(llama)
    assert main(command) == 1
    assert "aren't those that" in capsys.readouterr().err
    shutil.rmtree(llama)  # the converted folder has the tokenizer too
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "local column alone: the teacher can't be had" in out and "end-to-end" not in out


def test_a_trained_teacher_is_known_by_its_weights(converted, capsys, tmp_path):
    text = str(converted / "text.txt")
    settings = {"dataset": text, "model": "gpt2-2x16x2", "regime": "finetuned-conversion", "max_len": 16}
    folder = save_converted(tmp_path / "model", **settings)
    manifest = json.loads((folder / "hhbench.json").read_text())
    config = RunConfig.from_dict(manifest["run"]["config"])
    task = TASKS.get("lm").build()
    torch.manual_seed(0)
    teacher = hosts.convert(task.build_model(config, task.load_data(config)), "softmax")
    models.save(teacher, tmp_path / "teacher")
    sha256 = models.manifest(tmp_path / "teacher")["weights_sha256"]

    def tell(**said: Any) -> None:
        manifest["run"]["teacher"] = {"folder": str(tmp_path / "teacher"), "score": 1.0, **said}
        (folder / "hhbench.json").write_text(json.dumps(manifest))

    command = ["fidelity", str(folder), "--examples", "4"]
    tell(weights_sha256=sha256)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "end-to-end" in out
    assert "skipped: the model has learned positions for 16 tokens" in out
    tell(weights_sha256="0" * 64)
    assert main(command) == 1
    assert "isn't the teacher of" in capsys.readouterr().err
    tell()
    assert main(command) == 0
    assert "doesn't say by which hash its teacher is known" in capsys.readouterr().out
    tell(folder=str(tmp_path / "nowhere"))
    assert main(command) == 0
    assert "the teacher isn't in" in capsys.readouterr().out
    assert main([*command, "--max-len", "32"]) == 2
    assert "has positions for 16 tokens" in capsys.readouterr().err
    other = make_text(tmp_path / "other.txt", 600, seed=2)
    assert main([*command, "--data", str(other)]) == 2
    assert "tokens that were made from its own data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command,code,said",
    [
        ([], 1, "is missing"),
        (["--lengths", "2,x"], 2, "whole numbers such as 1,2,4"),
        (["--lengths", "0"], 2, "whole numbers such as 1,2,4"),
        (["--examples", "0"], 2, "at least 1"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, command, code, said):
    assert main(["fidelity", str(tmp_path), *command]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_that_does_not_say_what_made_it(tmp_path, capsys):
    model = make_host("bert", 1, "hedgehog")
    models.save(model, tmp_path / "model")
    assert main(["fidelity", str(tmp_path / "model")]) == 1
    assert "doesn't say which run made it" in capsys.readouterr().err


def test_no_graph_is_built():
    """Of a model that trains, too: its weights ask for gradients."""
    _, model = with_teacher("llama", "hedgehog")
    seen: list[bool] = []
    slot = next(iter(hosts.slots(model).values()))
    slot.attention.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    measure(model, [{"input_ids": torch.randint(2, 20, (1, 6))}])
    assert seen
    assert not any(seen)
