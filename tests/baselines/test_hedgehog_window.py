"""The hybrid: its definition in loops, LoLCATs' numbers, no cancellation, decoding while tokens leave the window."""

import math

import pytest
import torch
from torch import Tensor

from hhbench.attention import MixerShape, build_attention
from hhbench.errors import UsageError

directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def build(shape: MixerShape, dtype=torch.float64, **options):
    """In evaluation mode, moved off its initial weights."""
    module = build_attention("hedgehog-window", shape, **options).to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def draw(N, *, batch=2, heads=(4, 2), E=3, dtype=torch.float64, grad=False):
    sizes = ((heads[0], 4), (heads[1], 4), (heads[1], E))
    return [torch.randn(batch, h, N, width, dtype=dtype, requires_grad=grad) for h, width in sizes]


def phi(x: Tensor, weight: Tensor) -> Tensor:
    y = x @ weight
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12)


def definition(module, q, k, v, key_mask=None):
    """Query by query, attended keys only; rows of padded queries are zero."""
    B, H, N, _ = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    key_mask = torch.ones(B, N, dtype=torch.bool) if key_mask is None else key_mask
    rows = [[q.new_zeros(H, v.shape[3]) for _ in range(N)] for _ in range(B)]
    for b in range(B):
        tokens = key_mask[b].nonzero().flatten().tolist()
        for i, raw in enumerate(tokens):
            seen = tokens[: i + 1] if module.shape.causal else tokens
            near = [j for place, j in enumerate(seen) if abs(i - place) < module.window]
            far = [j for place, j in enumerate(seen) if abs(i - place) >= module.window]
            scores = (k[b][:, near] @ q[b, :, raw, :, None]).squeeze(-1) * module.shape.scale
            top = scores.amax(-1, keepdim=True)
            gate = torch.sigmoid(module.gate_logit)[:, None]
            features = phi(k[b][:, far], module.key_map.weight)
            of_query = phi(q[b, :, raw, None], module.query_map.weight)
            a = torch.cat([gate * (scores - top).exp(), (features @ of_query.mT).squeeze(-1)], 1)
            values = torch.cat([v[b][:, near], v[b][:, far]], 1)
            rows[b][raw] = (a[..., None] * values).sum(1) / a.sum(1, keepdim=True)
    return torch.stack([torch.stack(row) for row in rows]).transpose(1, 2)


def holes(N):
    key_mask = torch.rand(2, N) < 0.6
    key_mask[0, :3] = key_mask[1, -2:] = False
    key_mask[:, N // 2] = True
    return key_mask


@directions
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("window,N", [(1, 9), (4, 9), (40, 9), (1, 140), (5, 140), (70, 140), (300, 140)])
def test_every_form_is_the_definition(window, N, masked, causal, make_shape):
    """Outputs and gradients, that of c_i among them, also where the window is wider than the sequence."""
    module = build(make_shape(num_heads=4, num_kv_heads=2, scale=0.7, causal=causal), window=window)
    inputs, key_mask = draw(N, grad=True), holes(N) if masked else None
    expected = definition(module, *inputs, key_mask)
    attended = torch.ones(2, N).bool() if key_mask is None else key_mask
    leaves, cotangent = [*inputs, *module.parameters()], torch.randn_like(expected) * attended[:, None, :, None]

    def grads(out):
        found = torch.autograd.grad((out * cotangent).sum(), leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    true = grads(expected)
    for form in ("auto", "quadratic", "chunked", "recurrent")[: 4 if causal else 3]:
        out = module(*inputs, key_mask=key_mask, form=form)
        torch.testing.assert_close(
            out.transpose(1, 2)[attended], expected.transpose(1, 2)[attended], atol=1e-10, rtol=0
        )
        torch.testing.assert_close(grads(out), true, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(module.quadratic(*inputs, key_mask=key_mask), out, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
def test_it_gives_lolcats_numbers(form, make_shape):
    """Its own code gives these outputs and weights for a window of 2, maps at the identity and a logit of -2.1972."""
    q = torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 2], [2, -1]])[None, None]
    k = torch.tensor([[0.0, 1], [1, 1], [2, 0], [-1, 1], [1, -1]])[None, None]
    v = torch.tensor([1.0, 2, 4, 8, 16]).view(1, 1, 5, 1)
    module = build_attention("hedgehog-window", make_shape(num_heads=1, head_dim=2), window=2)
    out = module(q, k, v, form=form)
    expected = torch.tensor([1, 1.5, 1.3333333, 1.6777501, 3.2470298])
    torch.testing.assert_close(out.flatten(), expected, atol=2e-6, rtol=0)
    last = torch.tensor([0.17248751, 0.29651523, 0.50091964, 0.00042608, 0.029651523])
    torch.testing.assert_close(module.weights(q, k)[0, 0, 4], last, atol=1e-6, rtol=0)


def test_it_begins_at_hedgehog_and_a_gate_of_a_tenth(make_shape):
    module = build_attention("hedgehog-window", make_shape(num_heads=3), feature_dim=5)
    torch.testing.assert_close(module.gate_logit, torch.full((3,), -2.1972246))
    torch.testing.assert_close(module.gate_logit.sigmoid(), torch.full((3,), 0.1))
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "gate_logit": (3,),
        "query_map.weight": (3, 4, 5),
        "key_map.weight": (3, 4, 5),
    }
    assert torch.equal(module.key_map.weight[..., :4], torch.eye(4).expand(3, 4, 4))
    assert torch.equal(module.key_map.weight, module.query_map.weight)
    assert module.key_map.weight is not module.query_map.weight


@directions
def test_a_window_of_all_tokens_is_softmax(causal, make_shape):
    """The gate cancels, and so does c_i; the maps are still part of the graph, or DDP would stop."""
    shape, inputs = make_shape(num_heads=4, num_kv_heads=2, causal=causal), draw(9)
    module, softmax = build(shape, window=9), build_attention("softmax", shape)
    for form in ("quadratic", "chunked"):
        out = module(*inputs, form=form)
        torch.testing.assert_close(out, softmax(*inputs), atol=1e-12, rtol=0)
        found = torch.autograd.grad(out.sum(), list(module.parameters()))
        torch.testing.assert_close(found, tuple(torch.zeros_like(g) for g in found), atol=1e-12, rtol=0)


def test_the_gate_weighs_the_window_against_the_rest(make_shape):
    module = build(make_shape(num_heads=1), window=2)
    q, k, _ = draw(6, heads=(1, 1))

    def odds(gate: float) -> Tensor:
        with torch.no_grad():
            module.gate_logit.fill_(math.log(gate / (1 - gate)))
        weights = module.weights(q, k)[0, 0, 5]
        return weights[4:].sum() / weights[:4].sum()

    torch.testing.assert_close(odds(0.6), 3 * odds(0.2), atol=1e-12, rtol=1e-12)


@directions
@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_gradients_are_those_of_the_function(form, causal, make_shape):
    module = build(make_shape(num_heads=2, num_kv_heads=1, causal=causal), window=2)
    inputs = draw(5, batch=1, heads=(2, 1), grad=True)
    assert torch.autograd.gradcheck(lambda *x: module(*x, form=form), inputs)
    q, k, v = inputs
    for parameter in module.parameters():
        assert torch.autograd.gradcheck(lambda _: module(q.detach(), k.detach(), v.detach(), form=form), parameter)


@directions
def test_c_is_the_maximum_of_the_window_only(causal, make_shape):
    """A far key with a score of thousands, which exp could not hold, changes no ratio in the window."""
    module = build(make_shape(num_heads=1, causal=causal), dtype=torch.float32, window=2)
    q, k, v = draw(8, heads=(1, 1), dtype=torch.float32)
    q[..., 0], k[:, :, 0, 0] = 100.0, 1000.0
    weights, scores = module.weights(q, k)[:, 0, 7], (q @ k.mT)[:, 0, 7] * module.shape.scale
    assert weights.isfinite().all() and scores[:, 0].min() > 10_000
    torch.testing.assert_close(weights[:, 6:] / weights[:, 6:].sum(-1, keepdim=True), scores[:, 6:].softmax(-1))
    assert (weights[:, 6:].sum(-1) > 0.01).all()
    for form in ("quadratic", "chunked"):
        assert module(q, k, v, form=form).isfinite().all()


@directions
def test_what_a_window_holds_leaves_no_rounding_in_the_rest(causal, make_shape):
    """A value of 1e7 whose key the window's softmax drops, though phi of the query and of the key are alike: a
    remainder made as total minus window would be off by 0.004.
    """
    shape = make_shape(num_heads=1, head_dim=2, causal=causal)
    module = build_attention("hedgehog-window", shape, window=4)
    with torch.no_grad():
        module.query_map.weight.neg_()
    q, k, v = torch.randn(3, 1, 1, 400, 2)
    near = slice(200 if causal else 197, 204)
    k[:, :, 200], v[:, :, 200], q[:, :, near] = torch.tensor([-60.0, 0]), 1e7, torch.tensor([60.0, 0])
    out = module(q, k, v, form="chunked")[:, :, near]
    expected = module.double()(q.double(), k.double(), v.double(), form="quadratic")[:, :, near]
    assert expected.abs().max() < 10
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


PIECES = {
    "one by one": [1] * 14,
    "pieces": [2, 5, 1, 6],
    "a prompt, then one by one": [9, 1, 1, 1, 1, 1],
    "a prompt and a piece": [3, 11],
}


@pytest.mark.parametrize("form", ["auto", "quadratic", "chunked", "recurrent"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", [1, 3, 40])
def test_a_prompt_in_pieces_is_the_whole(window, pieces, form, make_shape):
    """Across the moment when tokens leave the window, with a row padded on the left and one with holes."""
    module = build(make_shape(num_heads=4, num_kv_heads=2), window=window)
    inputs = draw(14, batch=3, E=4)
    key_mask = torch.ones(3, 14, dtype=torch.bool)
    key_mask[1, :5] = key_mask[2, [0, 3, 4, 8, 13]] = False
    for mask in (None, key_mask):
        expected, last = module(*inputs, key_mask=mask, return_state=True, form="quadratic")
        state, outputs, start = None, [], 0
        for parts in zip(*(x.split(pieces, 2) for x in inputs), strict=True):
            stop = start + parts[0].shape[2]
            part_mask = None if mask is None else mask[:, start:stop]
            out, state = module(*parts, key_mask=part_mask, state=state, return_state=True, form=form)
            outputs.append(out)
            start = stop
        torch.testing.assert_close(torch.cat(outputs, 2), expected, atol=1e-10, rtol=0)
        for name in ("ring_keys", "ring_values", "num_attended", "sums"):
            torch.testing.assert_close(getattr(state, name), getattr(last, name), atol=1e-10, rtol=0)


def test_a_state_is_the_ring_and_the_sums_of_what_left_it(make_shape):
    module = build(make_shape(num_heads=2, num_kv_heads=1), window=3)
    q, k, v = draw(8, batch=1, heads=(2, 1))
    key_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    _, state = module(q, k, v, key_mask=key_mask, return_state=True)
    assert torch.equal(state.ring_keys, k[:, :, [4, 6, 7]]) and torch.equal(state.ring_values, v[:, :, [4, 6, 7]])
    features = phi(k[:, :, [2, 3]].expand(1, 2, 2, 4), module.key_map.weight)
    torch.testing.assert_close(state.sums[..., :-1], features.mT @ v[:, :, [2, 3]], atol=1e-12, rtol=0)
    torch.testing.assert_close(state.sums[..., -1], features.sum(2), atol=1e-12, rtol=0)
    assert state.num_attended.item() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_keeps_its_size(dtype, make_shape):
    """In float32, whatever comes in: 256 + 1 is 256 in bfloat16."""
    module = build(make_shape(num_heads=4, num_kv_heads=2), dtype=torch.float32, window=4, feature_dim=3)
    state = None
    for n in range(1, 9):
        _, state = module(*draw(1, batch=3, E=4, dtype=dtype), state=state, return_state=True)
        ring, sums = 4 * 2 * (4 + 4), 4 * 6 * (4 + 1)
        assert state.nbytes == module.state_bytes(n, batch_size=3) == 3 * ((ring + sums) * 4 + 8)
    rows = torch.tensor([2, 0])
    assert torch.equal(state.select(rows).sums, state.sums[rows])


@pytest.mark.parametrize("form", ["auto", "quadratic", "chunked", "recurrent"])
def test_fewer_queries_than_keys_continue_a_state(form, make_shape):
    module = build(make_shape(num_heads=4, num_kv_heads=2), window=3)
    q, k, v = draw(20)
    for mask in (None, holes(20)):
        head, tail = (None, None) if mask is None else (mask[:, :8], mask[:, 8:])
        whole = module(q, k, v, key_mask=mask)
        _, state = module(q[:, :, :8], k[:, :, :8], v[:, :, :8], key_mask=head, return_state=True)
        out = module(q[:, :, 15:], k[:, :, 8:], v[:, :, 8:], key_mask=tail, state=state, form=form)
        torch.testing.assert_close(out, whole[:, :, 15:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("num_queries", [1, 30, 250])
@directions
def test_the_last_queries_of_many_keys(num_queries, causal, make_shape):
    """Keys before the first slab are far from all of the queries and belong to the sum."""
    module = build(make_shape(num_heads=4, num_kv_heads=2, causal=causal), window=5)
    q, k, v = draw(300)
    for mask in (None, holes(300)):
        expected = module.quadratic(q, k, v, key_mask=mask)[:, :, -num_queries:]
        for form in ("auto", "chunked"):
            found = module(q[:, :, -num_queries:], k, v, key_mask=mask, form=form)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def saved_bytes(module, N: int, form: str) -> int:
    """What the backward pass keeps: the bytes of all distinct storages that autograd saved."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = draw(N, batch=1, heads=(1, 1), dtype=torch.float32, grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = module(*inputs, form=form)
    assert out.requires_grad  # the graph lives here, so that no storage was freed and counted twice
    return sum(storages.values())


@directions
def test_memory_is_linear_but_for_the_quadratic_form(causal, make_shape):
    module = build(make_shape(num_heads=1, causal=causal), dtype=torch.float32, window=16)
    growth = {f: saved_bytes(module, 2048, f) / saved_bytes(module, 1024, f) for f in ("auto", "quadratic")}
    assert growth["auto"] <= 2.2
    assert growth["quadratic"] >= 3.5


@directions
def test_65536_tokens(causal, make_shape):
    """Against the last queries over all pairs, in float64."""
    module = build(make_shape(num_heads=1, head_dim=32, causal=causal), dtype=torch.float32)
    q, k, v = torch.randn(3, 1, 1, 65_536, 32)
    with torch.no_grad():
        out = module(q, k, v)[:, :, -64:]
        expected = module.double()(q[:, :, -64:].double(), k.double(), v.double(), form="quadratic")
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)


def test_what_it_can_t_do_is_refused(make_shape):
    x = torch.randn(1, 2, 5, 4)
    module = build(make_shape(causal=False), dtype=torch.float32)
    with pytest.raises(UsageError, match="bidirectional attention has no state"):
        module(x, x, x, return_state=True)
    with pytest.raises(UsageError, match="no recurrent form"):
        module(x, x, x, form="recurrent")
    with pytest.raises(UsageError, match="no form named 'chunk'"):
        module(x, x, x, form="chunk")
    with pytest.raises(UsageError, match="window must be at least 1, not 0"):
        build_attention("hedgehog-window", make_shape(), window=0)
    assert module.state_bytes(10) is None
