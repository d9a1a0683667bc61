"""Attention transfer: what is taught, that nothing else changes, and the numbers of the fidelity report."""

import copy
import gc
import itertools
import math
from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hhbench import distill, hosts
from hhbench.attention import ATTENTIONS, Attention, FeatureMap, MixerShape, build_attention
from hhbench.distill import TransferLoss, draw_blocks, intercepted
from hhbench.errors import HHBenchError, UsageError
from hhbench.fidelity import measure
from hhbench.hosts import AttentionSlot, Placement
from hhbench.linear_attention import LinearAttention
from hhbench.train import encode

VOCAB, LENGTH = 30, 12


def make_host(family: str, layers: int, attn: str, **options: Any) -> nn.Module:
    """A host whose attention is far from uniform, with freshly converted layers."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if family == "bert":
        model: nn.Module = tf.BertForMaskedLM(tf.BertConfig(**settings))
    else:
        settings |= {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return hosts.convert(model, attn, **options).eval()


def make_inputs(mask: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (4, LENGTH))
    lengths = torch.tensor([[LENGTH], [7], [3], [1]])
    tokens = torch.arange(LENGTH)
    attended = {"all": tokens >= 0 * lengths, "right": tokens < lengths, "left": tokens >= LENGTH - lengths}[mask]
    return {"input_ids": ids, "attention_mask": attended.long(), "position_ids": hosts.position_ids(attended)}


def num_queries(inputs: dict[str, Tensor]) -> int:
    return int(inputs["attention_mask"].sum())


def backward(
    model: nn.Module, inputs: dict[str, Tensor], *, weight: float = 1.0, **arguments: Any
) -> dict[str, TransferLoss]:
    """One pass of attention transfer: gradients lie in the maps afterwards."""
    losses = {name: TransferLoss(weight=weight, **arguments) for name in hosts.slots(model)}
    with torch.no_grad(), intercepted(model, dict(losses)):
        encode(model, inputs)
    return losses


def teach(model: nn.Module, inputs: dict[str, Tensor], *, steps: int) -> None:
    optimizer = torch.optim.AdamW(hosts.attention_parameters(model), lr=3e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, inputs, weight=1 / num_queries(inputs))
        optimizer.step()


def fidelity(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[float, float, float]]:
    """Per layer: KL(softmax || weights), entropy of softmax, entropy of the attention, means over heads."""
    layers = (layer.local for layer in measure(model, [inputs], order=False).layers)
    return [(mean(one.kl), mean(one.teacher_entropy), mean(one.student_entropy)) for one in layers]


def watched(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """q, k, v and the mask that each layer gets while softmax's output is passed on."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}

    def watch(name: str) -> hosts.Interceptor:
        def interceptor(slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
            seen[name] = (q, k, v, key_mask)
            return build_attention("softmax", slot.attention.shape).eval()(q, k, v, key_mask=key_mask)

        return interceptor

    with torch.no_grad(), intercepted(model, {name: watch(name) for name in hosts.slots(model)}):
        encode(model, inputs)
    return seen


# --- the whole of it ---


@pytest.mark.parametrize("attn", ["hedgehog", "t2r"])
@pytest.mark.parametrize("family,layers", itertools.product(["bert", "llama"], [1, 3]))
def test_transfer_brings_the_maps_to_softmax_and_changes_nothing_else(family, layers, attn):
    model, inputs = make_host(family, layers, attn), make_inputs()
    before = fidelity(model, inputs)
    assert min(kl for kl, _, _ in before) > 0.03
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teach(model, inputs, steps=40)
    after = fidelity(model, inputs)
    for (kl_before, teacher, _), (kl_after, same_teacher, _) in zip(before, after, strict=True):
        assert 0 <= kl_after <= 0.7 * kl_before
        assert teacher == same_teacher  # each layer sees what softmax would have passed on
    added = {id(p) for p in hosts.attention_parameters(model)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, state[name]) == (id(tensor) not in added), name
        assert id(tensor) in added or tensor.grad is None, name


def test_the_softmax_model_s_hidden_states_are_passed_on():
    for family, attn in itertools.product(["bert", "llama"], ["hedgehog", "t2r"]):
        model, inputs = make_host(family, 3, attn), make_inputs()
        softmax = hosts.convert(copy.deepcopy(model), "softmax")
        with torch.no_grad():
            hidden = softmax(**inputs, output_hidden_states=True).hidden_states
        with torch.no_grad(), intercepted(model, {name: TransferLoss() for name in hosts.slots(model)}):
            taught = model(**inputs, output_hidden_states=True).hidden_states
        assert all(torch.equal(one, other) for one, other in zip(taught, hidden, strict=True))


# --- the gradient ---


def features(attn: str, feature_map: nn.Module, x: Tensor) -> Tensor:
    """The maps of hedgehog and t2r, written again."""
    if attn == "hedgehog":
        y = torch.einsum("bhnd,hdf->bhnf", x, feature_map.weight)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)
    return (torch.einsum("bhnd,hdf->bhnf", x, feature_map.weight) + feature_map.bias).relu()


def loss_by_hand(attn: str, attention: Any, q: Tensor, k: Tensor, key_mask: Tensor) -> Tensor:
    """Sum over attended queries of the mean over heads of the soft cross-entropy, one graph and no blocks."""
    shape = attention.shape
    k = k.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1)
    visible = key_mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    if shape.causal:
        visible = visible.tril()
    scores = (q @ k.mT * shape.scale).masked_fill(~visible, -1e300)
    target = scores.softmax(-1)
    mapped_q = features(attn, attention.query_map, q).clamp_min(1e-12)
    mapped_k = features(attn, attention.key_map, k).clamp_min(1e-12)
    products = (mapped_q @ mapped_k.mT).masked_fill(~visible, 0.0)
    attended = key_mask[:, None, :].expand(products.shape[:3])
    entropy = torch.zeros((), dtype=q.dtype)
    for b, h, i in attended.nonzero().tolist():
        sees = visible[b, 0, i]
        weights = products[b, h, i][sees] / products[b, h, i][sees].sum()
        entropy = entropy - (target[b, h, i][sees] * weights.log()).sum()
    return entropy / shape.num_heads


@pytest.mark.parametrize("attn", ["hedgehog", "t2r"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mask", ["all", "right", "left"])
def test_the_gradient_is_that_of_the_loss_in_one_graph(family, attn, mask, monkeypatch):
    model, inputs = make_host(family, 2, attn).double(), make_inputs(mask)
    with torch.no_grad():
        for parameter in hosts.attention_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    seen = watched(model, inputs)
    key_mask = inputs["attention_mask"].bool()
    weight = 0.37
    losses, parameters = {}, hosts.attention_parameters(model)
    for name, slot in hosts.slots(model).items():
        q, k, _, _ = seen[name]
        losses[name] = loss_by_hand(attn, slot.attention, q, k, key_mask)
    expected = torch.autograd.grad(weight * sum(losses.values()), parameters)
    for block in (256, 5, 1):
        monkeypatch.setattr(distill, "QUERY_BLOCK", block)
        model.zero_grad()
        found = backward(model, inputs, weight=weight)
        for name, loss in losses.items():
            assert float(found[name].total) == pytest.approx(float(loss.detach()), abs=1e-9)
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-10)


def test_padding_changes_no_gradient():
    model = make_host("llama", 2, "hedgehog").double()
    ids = torch.randint(2, VOCAB, (1, 7))
    alone = {"input_ids": ids, "attention_mask": torch.ones(1, 7).long(), "position_ids": torch.arange(7)[None]}
    backward(model, alone)
    expected = [p.grad.clone() for p in hosts.attention_parameters(model)]
    for left, right in ((3, 0), (0, 4)):
        mask = torch.tensor([[0] * left + [1] * 7 + [0] * right])
        noise = torch.randint(2, VOCAB, (1, 7 + left + right))
        noise[:, left : left + 7] = ids
        model.zero_grad()
        backward(model, {"input_ids": noise, "attention_mask": mask, "position_ids": hosts.position_ids(mask)})
        for parameter, gradient in zip(hosts.attention_parameters(model), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-10)


def roughened(model: nn.Module) -> nn.Module:
    """In float64, with maps off their start."""
    model.double()
    with torch.no_grad():
        for parameter in hosts.attention_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in hosts.attention_parameters(model)]


@pytest.mark.parametrize("loss", ["output", "both"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mask", ["all", "right", "left"])
def test_the_output_is_taught_too(family, loss, mask, monkeypatch):
    """Against the student's own forward pass and one graph; with the weights, a thousand times."""
    model, inputs = roughened(make_host(family, 2, "hedgehog")), make_inputs(mask)
    seen = watched(model, inputs)
    key_mask = inputs["attention_mask"].bool()
    expected, parameters = {}, hosts.attention_parameters(model)
    for name, slot in hosts.slots(model).items():
        q, k, v, _ = seen[name]
        softmax = build_attention("softmax", slot.attention.shape).eval()(q, k, v, key_mask=key_mask)
        errors = (slot.attention(q, k, v, key_mask=key_mask) - softmax).square().mean(-1).mean(1)
        expected[name] = errors[key_mask].sum()
        if loss == "both":
            expected[name] = 1000 * expected[name] + loss_by_hand("hedgehog", slot.attention, q, k, key_mask)
    by_hand = torch.autograd.grad(0.1 * sum(expected.values()), parameters)
    for block in (256, 5):
        monkeypatch.setattr(distill, "QUERY_BLOCK", block)
        model.zero_grad()
        found = backward(model, inputs, weight=0.1, loss=loss)
        for name, value in expected.items():
            assert float(found[name].total) == pytest.approx(float(value.detach()), rel=1e-9)
        for found_gradient, gradient in zip(gradients(model), by_hand, strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found_gradient, gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("attn,options", [("hedgehog", {}), ("hedgehog-window", {"window": 3}), ("t2r", {})])
@pytest.mark.parametrize("mask", ["all", "right", "left"])
def test_blocks_of_queries_that_see_every_key_are_those_of_whole_rows(attn, options, mask, monkeypatch):
    model, inputs = roughened(make_host("bert", 2, attn, **options)), make_inputs(mask)
    monkeypatch.setattr(distill, "QUERY_BLOCK", 5)
    blocked = backward(model, inputs, loss="both")
    found = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(distill, "has_features", lambda student: False)
    for slot in hosts.slots(model).values():
        monkeypatch.setattr(type(slot.attention), "ordered_by_positions", False)
    whole = backward(model, inputs, loss="both")
    for name, loss in whole.items():
        assert float(blocked[name].total) == pytest.approx(float(loss.total), rel=1e-10)
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


# --- the gradient by formula ---

MAPS: list[tuple[str, dict[str, Any]]] = [
    ("hedgehog", {}),
    ("hedgehog", {"tie_qk": True}),
    ("hedgehog", {"share_kv_heads": True}),
    ("hedgehog", {"activation": "exp"}),  # keys with log scales
    ("hedgehog", {"activation": "exp", "share_kv_heads": True}),
    ("t2r", {}),
    ("taylor", {"project_to": 2}),  # signed features
]


class LearnedScale(FeatureMap):
    """Features that know where they stand, and keys whose log scale is learned, and theirs alone."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.direction = nn.Parameter(torch.randn(shape.num_heads, shape.head_dim, 1))

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        return self._features(q, positions)

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._features(k, positions), (k @ self.direction.to(k.dtype)).squeeze(-1)

    def _features(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.clamp(-3, 3).exp() * (1 + positions[:, None, :, None] * torch.arange(x.shape[-1]).to(x.dtype))


def taught(attention: Attention, qkv: list[Tensor], key_mask: Tensor | None, **arguments: Any) -> list[Tensor]:
    """The loss and the gradients of a layer; those of a fixed draw where queries are sampled."""
    attention.zero_grad(set_to_none=True)
    loss = TransferLoss(weight=0.3, generator=torch.Generator().manual_seed(1), **arguments)
    loss(make_slot(attention), *qkv, key_mask)
    return [loss.total, *(p.grad for p in attention.parameters() if p.grad is not None)]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    attn=st.sampled_from([*MAPS, None]),
    causal=st.booleans(),
    earlier=st.sampled_from([0, 3]),
    mask=st.sampled_from(["none", "all", "right", "left", "gaps"]),
    loss=st.sampled_from(distill.LOSSES),
    queries=st.sampled_from([0, 4]),
    spread=st.sampled_from([1.0, 6.0]),
    sizes=st.tuples(st.sampled_from([256, 5]), st.sampled_from([1024, 8]), st.sampled_from([2**17, 40])),
)
def test_the_formula_is_the_gradient_of_the_weights(attn, causal, earlier, mask, loss, queries, spread, sizes):
    """Against the path that any attention takes: `weights`, differentiated."""
    torch.manual_seed(2)
    shape = MixerShape(dim=12, num_heads=4, num_kv_heads=2, head_dim=3, scale=0.6, max_len=64, causal=causal)
    if attn is None:
        attention: Any = LinearAttention(shape, LearnedScale)
    else:
        attention = build_attention(attn[0], shape, **attn[1])
    attention.double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    N, M = 13, 13 + earlier
    q, k, v = (spread * torch.randn(3, h, n, 3, dtype=torch.float64) for h, n in ((4, N), (2, M), (2, M)))
    lengths, tokens = torch.tensor([[M], [9], [1]]), torch.arange(M)
    key_mask = {
        "none": None,
        "all": torch.ones(3, M, dtype=torch.bool),
        "right": tokens < lengths,
        "left": tokens >= M - lengths,
        "gaps": (tokens * lengths) % 3 != 1,
    }[mask]
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], torch.nan)  # whatever lies there
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("QUERY_BLOCK", "MAPPED", "TILE"), sizes, strict=True):
            patch.setattr(distill, name, size)
        patch.setattr(distill, "SAMPLED_BLOCK", 2)
        found = taught(attention, [q, k, v], key_mask, loss=loss, queries=queries)
        patch.setattr(distill, "has_features", lambda student: False)
        expected = taught(attention, [q, k, v], key_mask, loss=loss, queries=queries)
    assert len(found) == len(expected) > 1
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9 * float(other.abs().max()), rtol=1e-9)


@pytest.mark.parametrize("learned", [False, True])
def test_scores_that_vanish_pass_no_gradient_on(learned, monkeypatch):
    """In float32, a key whose scale lies far below another's has weight 0, and an infinite logarithm."""
    torch.manual_seed(0)
    shape = MixerShape(dim=4, num_heads=1, num_kv_heads=1, head_dim=4, scale=0.01, max_len=8, causal=True)
    attention = (
        LinearAttention(shape, LearnedScale) if learned else build_attention("hedgehog", shape, activation="exp")
    )
    attention.eval()
    q, v = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    k = torch.randn(1, 1, 6, 4) * torch.tensor([100.0, 1, 1, 100, 1, 100])[:, None]
    found = taught(attention, [q, k, v], None)
    monkeypatch.setattr(distill, "has_features", lambda student: False)
    expected = taught(attention, [q, k, v], None)
    assert all(x.isfinite().all() for x in found)
    assert expected[0] > 150  # the floor was reached
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected[1:])
    assert largest > 0.1
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * largest, rtol=1e-4)


def test_weights_of_a_subclass_are_its_own(make_shape):
    class Sharper(LinearAttention):
        def weights(self, *args: Any, **kwargs: Any) -> Tensor:
            squared = super().weights(*args, **kwargs).square()
            return squared / squared.sum(-1, keepdim=True)

    part, shape = ATTENTIONS.get("hedgehog").part, make_shape()
    qkv = [x.float() for x in random_qkv(shape)]
    plain, sharper = (taught(kind(shape, part), qkv, None)[0] for kind in (LinearAttention, Sharper))
    assert abs(plain - sharper) > 1e-3
    assert not distill.has_features(Sharper(shape, part))


PARTS = {name: ATTENTIONS.get(name).part for name in ATTENTIONS.names()}


def in_any_order() -> list[str]:
    """The attentions that say that they know the order of tokens by their positions alone."""
    classes = {name: LinearAttention if issubclass(part, FeatureMap) else part for name, part in PARTS.items()}
    return [name for name, part in classes.items() if getattr(part, "ordered_by_positions", False)]


@pytest.mark.parametrize("attn", in_any_order())
def test_tokens_in_another_order_with_their_positions(attn, make_shape):
    """The weights are those of the tokens in their own order."""
    shape, options = make_shape(causal=False), {"window": 3} if "window" in attn else {}
    attention = build_attention(attn, shape, **options).double().eval()
    q, k, _ = random_qkv(shape, length=9)
    key_mask = torch.tensor([[True] * 9, [False] + [True] * 6 + [False] * 2])
    positions = (key_mask.long().cumsum(-1) - 1).clamp_min(0)
    order = torch.randperm(9)
    whole = attention.weights(q, k, key_mask=key_mask)
    keys, mask, places = k[:, :, order], key_mask[:, order], positions[:, order]
    found = attention.weights(q[:, :, order[-4:]], keys, key_mask=mask, positions=places)
    expected, asked = whole[:, :, order[-4:]][..., order], mask[:, None, -4:, None]
    torch.testing.assert_close(found * asked, expected * asked, atol=1e-12, rtol=1e-12)


def test_the_kinds_of_loss():
    with pytest.raises(UsageError, match=r"no transfer loss named 'weight'. Did you mean 'weights'"):
        TransferLoss(loss="weight")


# --- a sample of the queries ---


def choices(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[Any]:
    """What `run` gives for every choice of blocks that may be drawn; each layer draws the same ones."""
    asked: set[tuple[int, int]] = set()

    def note(count: int, taken: int, generator: Any) -> list[int]:
        asked.add((count, taken))
        return list(range(taken))

    monkeypatch.setattr(distill, "draw_blocks", note)
    run()
    ((count, taken),) = asked
    assert 0 < taken < count
    found = []
    for drawn in itertools.combinations(range(count), taken):
        monkeypatch.setattr(distill, "draw_blocks", lambda *_, drawn=drawn: list(drawn))
        found.append(run())
    return found


@pytest.mark.parametrize("loss", ["weights", "output", "both"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mask", ["all", "right", "left"])
def test_a_sample_s_mean_is_the_whole_loss(family, loss, mask, monkeypatch):
    """Over all choices of 2 of 3 blocks, of 5, 5 and 2 queries."""
    model, inputs = roughened(make_host(family, 2, "hedgehog")), make_inputs(mask)
    names = list(hosts.slots(model))

    def run(**arguments: Any) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        losses = backward(model, inputs, weight=0.3, loss=loss, **arguments)
        return torch.stack([losses[name].total for name in names]), gradients(model)

    monkeypatch.setattr(distill, "SAMPLED_BLOCK", 5)
    total, whole = run()
    found = choices(monkeypatch, lambda: run(queries=10))
    assert len(found) == 3
    assert not torch.allclose(found[0][0], total)
    torch.testing.assert_close(torch.stack([t for t, _ in found]).mean(0), total, atol=1e-9, rtol=1e-9)
    for index, gradient in enumerate(whole):
        mean = torch.stack([g[index] for _, g in found]).mean(0)
        torch.testing.assert_close(mean, gradient, atol=1e-9, rtol=1e-9)


def test_a_sample_of_outputs_has_the_mean_of_all(make_shape, monkeypatch):
    shape = make_shape()
    slot = make_slot(Gate(shape).double())
    q, k, v = random_qkv(shape)
    key_mask = torch.arange(6) < torch.tensor([[6], [4]])

    def run(queries: int = 3) -> Tensor:
        slot.attention.gain.grad = None
        loss = TransferLoss(queries=queries)
        loss(slot, q, k, v, key_mask)
        return torch.cat([loss.total[None], slot.attention.gain.grad.flatten()])

    whole = run(0)
    assert torch.equal(run(6), whole)
    monkeypatch.setattr(distill, "SAMPLED_BLOCK", 1)
    found = choices(monkeypatch, run)
    assert len(found) == math.comb(6, 3)
    torch.testing.assert_close(torch.stack(found).mean(0), whole, atol=1e-12, rtol=1e-12)


def test_what_is_drawn():
    generator = torch.Generator().manual_seed(3)
    drawn = [draw_blocks(7, 3, generator) for _ in range(50)]
    assert all(found == sorted(set(found)) and len(found) == 3 and found[-1] < 7 for found in drawn)
    assert len(set(map(tuple, drawn))) > 20
    assert [draw_blocks(7, 3, torch.Generator().manual_seed(3)) for _ in range(2)] == [drawn[0]] * 2
    torch.manual_seed(5)
    first = draw_blocks(100, 10, None)
    torch.manual_seed(5)
    assert draw_blocks(100, 10, None) == first  # torch's own generator by default


@pytest.mark.parametrize("length,queries,expected", [(300, 64, 64), (300, 10, 10), (40, 64, 40), (301, 0, 301)])
def test_about_so_many_queries_are_taken(length, queries, expected, make_shape):
    shape = make_shape()
    slot = make_slot(build_attention("hedgehog", shape))
    seen = []
    map_queries = slot.attention.map_queries

    def watch(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(q.shape[2])
        return map_queries(q, *args, **kwargs)

    slot.attention.map_queries = watch
    q, k, v = (x.float() for x in random_qkv(shape, length=length))
    with torch.no_grad():
        TransferLoss(queries=queries)(slot, q, k, v, None)
    assert expected - 16 <= sum(seen) <= expected


# --- what can't be taught ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_is_no_number_is_named(value):
    model, inputs = make_host("bert", 3, "hedgehog"), make_inputs()
    model.bert.encoder.layer[1].attention.self.value.weight.data[0, 0] = value
    with pytest.raises(HHBenchError, match=r"softmax at layer bert\.encoder\.layer\.1\.attention\.self of the teacher"):
        backward(model, inputs)


@pytest.mark.parametrize("attn", ["softmax", "elu"])
def test_a_layer_with_nothing_to_learn_passes_softmax_on(attn, make_shape):
    shape = make_shape()
    q, k, v = random_qkv(shape)
    loss = TransferLoss()
    out = loss(make_slot(build_attention(attn, shape)), q, k, v, None)
    assert torch.equal(out, build_attention("softmax", shape)(q, k, v))
    assert float(loss.total) == 0


# --- without weights ---


class Gate(Attention):
    """A mean of the values so far, gated by the query: no weights."""

    has_weights = False

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.gain = nn.Parameter(torch.ones(shape.num_heads, 1, shape.head_dim))

    def forward(self, q, k, v, *, key_mask=None, positions=None):
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        return (q * self.gain).sigmoid() * v.cumsum(2)


def make_slot(attention: Attention) -> AttentionSlot:
    return AttentionSlot(attention, Placement("layer", type(attention).__name__, {}, attention.shape))


def random_qkv(shape: MixerShape, batch: int = 2, length: int = 6) -> list[Tensor]:
    return [torch.randn(batch, shape.num_heads, length, shape.head_dim, dtype=torch.float64) for _ in range(3)]


def test_an_attention_without_weights_learns_the_output(make_shape):
    shape = make_shape()
    slot = make_slot(Gate(shape).double())
    q, k, v = random_qkv(shape)
    key_mask = torch.arange(6) < torch.tensor([[6], [4]])
    loss = TransferLoss(weight=0.5)
    with torch.no_grad():
        out = loss(slot, q, k, v, key_mask)
    softmax = build_attention("softmax", shape)(q, k, v, key_mask=key_mask)
    assert torch.equal(out, softmax)
    errors = (slot.attention(q, k, v, key_mask=key_mask) - softmax).square().mean(-1)
    by_hand = errors.mean(1)[key_mask].sum()
    assert float(loss.total) == pytest.approx(float(by_hand.detach()), abs=1e-12)
    (expected,) = torch.autograd.grad(0.5 * by_hand, [slot.attention.gain])
    torch.testing.assert_close(slot.attention.gain.grad, expected, atol=1e-12, rtol=0)


def test_the_teacher_drops_nothing_out(make_shape):
    shape = make_shape(dropout=0.5)
    slot = make_slot(build_attention("hedgehog", shape).double()).train()
    q, k, v = random_qkv(shape)
    loss = TransferLoss()
    outputs = [loss(slot, q, k, v, None) for _ in range(2)]
    assert torch.equal(*outputs)
    assert slot.training


# --- memory ---


class Saved:
    """What autograd keeps for backward, in bytes, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def measure(self, model: nn.Module, inputs: dict[str, Tensor]) -> int:
        counter = self

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                counter.now += tensor.numel() * tensor.element_size()
                counter.peak = max(counter.peak, counter.now)

            def __del__(self) -> None:
                counter.now -= self.tensor.numel() * self.tensor.element_size()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            backward(model, inputs)
        return self.peak


def test_memory_does_not_grow_with_depth(monkeypatch):
    inputs = make_inputs()
    peaks = {layers: Saved() for layers in (1, 6)}
    for layers, saved in peaks.items():
        assert saved.measure(make_host("llama", layers, "hedgehog"), inputs) > 0
        assert saved.now == 0  # nothing is left after the pass
    assert peaks[6].peak == peaks[1].peak
    monkeypatch.setattr(distill, "MAPPED", 8)
    assert Saved().measure(make_host("llama", 6, "hedgehog"), inputs) < peaks[1].peak


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator had handed out at most, beyond what it had before.

    From the profiler's record of every allocation, those inside a kernel among them: a process's resident memory
    depends on what the allocator keeps, and a count of tensors misses what kernels use.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def long_host(family: str, *, layers: int, width: int, length: int) -> nn.Module:
    """A host of heads 64 wide that takes so many tokens."""
    heads = width // 64
    if family == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=heads, n_positions=length, bos_token_id=None,
                eos_token_id=None,
            )
        )  # fmt: skip
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        "pad_token_id": 0,
    }
    if family == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**settings, intermediate_size=4 * width))
    settings |= {"num_key_value_heads": max(1, heads // 2), "bos_token_id": None, "eos_token_id": None}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**settings, intermediate_size=8 * width // 3))


def transfer_peak(family: str, attn: str, *, layers: int = 1, width: int, length: int) -> int:
    """Of one step; the maps' gradients, as large as the maps, are there before."""
    model = hosts.convert(long_host(family, layers=layers, width=width, length=length), attn).eval()
    return step_peak(model, length)


def step_peak(model: nn.Module, length: int, **arguments: Any) -> int:
    inputs = {"input_ids": torch.randint(2, VOCAB, (1, length))}
    for parameter in hosts.attention_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    return peak_memory(lambda: backward(model, inputs, weight=1 / length, **arguments))


def forward_peak(family: str, *, width: int, length: int) -> int:
    """Of transformers' own base model, without a graph, a head and a cache."""
    model = long_host(family, layers=1, width=width, length=length).eval().base_model
    inputs = {"input_ids": torch.randint(2, VOCAB, (1, length))}
    with torch.no_grad():
        return peak_memory(lambda: model(**inputs, **({} if family == "bert" else {"use_cache": False})))


LONG = [("llama", "hedgehog", 128), ("gpt2", "t2r", 64), ("bert", "hedgehog-window", 64)]
LONGER = list(itertools.product(["llama", "gpt2", "bert"], ["hedgehog", "t2r", "hedgehog-window"], [256]))


@pytest.mark.parametrize(
    "family,attn,width", [*LONG, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONGER)]
)
def test_memory_of_long_sequences(family, attn, width):
    """Linear in the number of tokens, and less than twice what the host itself takes."""
    half, whole = (transfer_peak(family, attn, width=width, length=length) for length in (2048, 4096))
    assert whole <= 2.2 * half
    assert whole < 2 * forward_peak(family, width=width, length=4096)


@pytest.mark.parametrize("family,attn", [("llama", "hedgehog"), ("gpt2", "hedgehog-window"), ("bert", "t2r")])
def test_memory_of_deep_models(family, attn):
    shallow, deep = (transfer_peak(family, attn, layers=layers, width=64, length=256) for layers in (6, 24))
    assert deep <= 1.1 * shallow


def test_samples_take_no_more_memory():
    model = hosts.convert(long_host("llama", layers=1, width=64, length=2048), "hedgehog").eval()
    whole, sample = (step_peak(model, 2048, queries=queries) for queries in (0, 256))
    assert sample <= whole


def test_no_graph_hangs_off_the_output():
    model, inputs = make_host("llama", 2, "hedgehog"), make_inputs()
    losses = {name: TransferLoss() for name in hosts.slots(model)}
    with torch.no_grad(), intercepted(model, dict(losses)):
        assert not model(**inputs).logits.requires_grad
    assert not any(loss.total.requires_grad for loss in losses.values())


# --- interceptors ---


def test_interceptors_are_gone_afterwards():
    model, inputs = make_host("bert", 2, "hedgehog"), make_inputs()
    first, second = hosts.slots(model)

    def fail(*args: Any) -> Tensor:
        raise RuntimeError("no")

    with intercepted(model, {second: fail}):
        assert hosts.slots(model)[first].interceptor is None
        assert hosts.slots(model)[second].interceptor is fail
    assert all(slot.interceptor is None for slot in hosts.slots(model).values())
    failing = intercepted(model, {first: TransferLoss(), second: fail})
    with pytest.raises(RuntimeError, match="no"), torch.no_grad(), failing:
        encode(model, inputs)
    assert all(slot.interceptor is None for slot in hosts.slots(model).values())
    with pytest.raises(KeyError), intercepted(model, {first: fail, "no such layer": fail}):
        pass
    assert all(slot.interceptor is None for slot in hosts.slots(model).values())


# --- the loss beside the report ---


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mask", ["all", "right", "left"])
def test_softmax_is_faithful_to_itself(family, mask):
    for kl, teacher, student in fidelity(make_host(family, 2, "softmax"), make_inputs(mask)):
        assert abs(kl) <= 1e-6
        assert teacher == student > 0.1


def test_padding_is_no_part_of_the_report():
    model = make_host("llama", 2, "hedgehog").double()
    ids = torch.randint(2, VOCAB, (1, 7))
    alone = {"input_ids": ids, "attention_mask": torch.ones(1, 7).long(), "position_ids": torch.arange(7)[None]}
    expected = fidelity(model, alone)
    for left, right in ((3, 0), (0, 4)):
        mask = torch.tensor([[0] * left + [1] * 7 + [0] * right])
        noise = torch.randint(2, VOCAB, (1, 7 + left + right))
        noise[:, left : left + 7] = ids
        padded = {"input_ids": noise, "attention_mask": mask, "position_ids": hosts.position_ids(mask)}
        for found, wanted in zip(fidelity(model, padded), expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-10)


def test_the_loss_is_the_divergence_and_the_entropy():
    model, inputs = make_host("llama", 2, "hedgehog").double(), make_inputs()
    losses = backward(model, inputs)
    for loss, (kl, teacher, _) in zip(losses.values(), fidelity(model, inputs), strict=True):
        assert float(loss.total) / num_queries(inputs) == pytest.approx(kl + teacher, abs=1e-6)
