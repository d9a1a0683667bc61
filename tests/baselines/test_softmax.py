"""Softmax: torch's own, with the scale of the shape."""

import dataclasses
import importlib.machinery
import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hhbench.attention import build_attention, repeat_heads
from hhbench.baselines import softmax
from hhbench.kernels import kernels


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def shape(request, make_shape):
    return make_shape(num_heads=4, num_kv_heads=2, scale=0.3, causal=request.param)


@pytest.fixture
def inputs():
    return [torch.randn(2, heads, 6, width, dtype=torch.float64) for heads, width in ((4, 4), (2, 4), (2, 3))]


def test_it_is_torch_s_attention(shape, inputs):
    expected = scaled_dot_product_attention(*inputs, is_causal=shape.causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(build_attention("softmax", shape)(*inputs), expected, atol=1e-12, rtol=0)


def test_it_is_torch_s_attention_under_a_mask(shape, inputs):
    key_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    visible = key_mask[:, None, None].expand(2, 1, 6, 6)
    visible = visible.tril() if shape.causal else visible
    expected = scaled_dot_product_attention(*inputs, attn_mask=visible, scale=0.3, enable_gqa=True)
    found = build_attention("softmax", shape)(*inputs, key_mask=key_mask)
    attended = key_mask[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[attended], expected[attended], atol=1e-12, rtol=0)


def test_the_scale_is_the_shape_s(shape, inputs):
    q, k, v = inputs
    found = build_attention("softmax", dataclasses.replace(shape, scale=0.6))(q, k, v)
    torch.testing.assert_close(found, build_attention("softmax", shape)(2 * q, k, v), atol=1e-12, rtol=0)
    assert (found - build_attention("softmax", shape)(q, k, v)).abs().max() > 0.01


def test_weights_by_hand(make_shape):
    """Scores log 1, log 2 and log 3 weigh 1/6, 2/6 and 3/6."""
    shape = make_shape(num_heads=1, head_dim=1, scale=1.0, causal=False)
    q, k = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 2.0, 3.0]).log().view(1, 1, 3, 1)
    found = build_attention("softmax", shape).weights(q, k)
    torch.testing.assert_close(found, (torch.tensor([1.0, 2.0, 3.0]) / 6).expand(1, 1, 3, 3))


def test_dropout_is_of_training_only(make_shape):
    module = build_attention("softmax", make_shape(dropout=0.5))
    x = torch.randn(1, 2, 6, 4)
    plain = build_attention("softmax", make_shape())(x, x, x)
    assert not torch.allclose(module(x, x, x), plain)
    assert torch.equal(module.eval()(x, x, x), plain)


def test_decoding_keeps_keys_and_values_of_every_token(make_shape):
    module = build_attention("softmax", make_shape(num_heads=4, num_kv_heads=2))
    assert module.state_bytes(10) == 10 * 2 * (4 + 4) * 4
    assert build_attention("softmax", make_shape(causal=False)).state_bytes(10) is None


def test_before_anything_is_replaced_it_is_itself(likeness):
    found = likeness("softmax")
    assert found.entropy == pytest.approx(4.806, abs=0.02)
    assert (found.kl, found.spearman) == pytest.approx((0, 1), abs=1e-12)


@pytest.mark.parametrize("num_heads", [2, 8])
def test_one_token_over_a_cache_copies_nothing(num_heads, make_shape):
    """Keys and values go to torch as they are, without a mask, and what ran is said."""
    module = build_attention("softmax", make_shape(num_heads=num_heads, num_kv_heads=2)).eval()
    q, cache = torch.randn(1, num_heads, 1, 4), torch.randn(2, 1, 2, 300, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each has a buffer
    try:
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile, kernels() as seen:
            module(q, *cache)
    finally:
        torch.set_num_threads(threads)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 <= largest < cache[0].numel() * 4
    assert seen == {"sdpa": 1}


@pytest.mark.parametrize("num_queries", [1, 3, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_grouped_heads_are_repeated_ones(num_queries, padded, shape, inputs):
    """However few the queries, with padding and without, and one row with no key."""
    key_mask = torch.tensor([[0, 1, 0, 1, 1, 1], [0] * 6]).bool() if padded else None
    module, (q, k, v) = build_attention("softmax", shape), inputs
    whole = build_attention("softmax", dataclasses.replace(shape, num_kv_heads=4))
    expected = whole(q, repeat_heads(k, 4), repeat_heads(v, 4), key_mask=key_mask)[:, :, -num_queries:]
    found = module(q[:, :, -num_queries:], k, v, key_mask=key_mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package, by torch's softmax: calls in its layout are noted; `fails` makes them fail."""

    class Package(types.ModuleType):
        calls = 0
        fails = False

        def flash_attn_func(self, q, k, v, dropout, *, softmax_scale, causal):
            self.calls += 1
            if self.fails:
                raise RuntimeError("no kernel image\nfor this GPU")
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=softmax_scale, is_causal=causal, enable_gqa=True
            )
            return out.transpose(1, 2)

    package = Package("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    softmax._flash_attn_works.cache_clear()
    yield package
    softmax._flash_attn_works.cache_clear()


def test_flash_attn_is_called_in_its_layout(shape, inputs, flash_attn, monkeypatch):
    expected = build_attention("softmax", shape)(*inputs)
    monkeypatch.setattr(softmax, "flash_attn_serves", lambda q, v: True)
    with kernels() as ran:
        found = build_attention("softmax", shape)(*inputs)
    assert list(ran) == ["flash-attn"]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    with kernels() as ran:  # it knows no mask of keys
        build_attention("softmax", shape)(*inputs, key_mask=torch.ones(2, 6, dtype=torch.bool))
    assert list(ran) == ["sdpa"]


def test_flash_attn_is_tried_once_and_left_out_where_it_fails(flash_attn, caplog):
    asked = torch.device("cpu"), torch.float32, 4, 3
    assert softmax._flash_attn_works(*asked)
    softmax._flash_attn_works.cache_clear()
    flash_attn.fails, flash_attn.calls = True, 0
    assert [softmax._flash_attn_works(*asked) for _ in range(2)] == [False, False]
    assert flash_attn.calls == 1
    assert "flash-attn fails here (RuntimeError: no kernel image for this GPU)" in caplog.text
    assert not softmax.flash_attn_serves(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)), "a CPU's tensors"
