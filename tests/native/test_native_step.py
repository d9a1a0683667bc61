"""The compiled step: the definition's numbers over many tokens, states that stay, and the plain form where it can't."""

import pytest
import torch
from native_cases import FORMS, hedgehog
from torch import Tensor

from hhbench import native
from hhbench.kernels import kernels
from hhbench.linear_sum import LinearState
from hhbench.native import step
from hhbench.profile.correctness import distance

CASES = FORMS | {
    "usual": {"B": 2, "H": 2, "D": 64, "E": 64},
    "one of each": {"B": 1, "H": 1, "D": 1, "E": 1, "half": 1},
    "wide values": {"B": 1, "H": 2, "D": 128, "E": 150, "half": 128},
}


@pytest.fixture
def without_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")


def decoded(attention, inputs, state=None, *, key_mask=None) -> tuple[Tensor, LinearState, int]:
    """The outputs of all tokens one by one, the state after them, and how many the compiled step took."""
    outputs = []
    with torch.inference_mode(), kernels() as seen:
        for i in range(inputs[0].shape[2]):
            mask = None if key_mask is None else key_mask[:, i : i + 1]
            token = [x[:, :, i : i + 1] for x in inputs]
            out, state = attention(*token, key_mask=mask, state=state, return_state=True)
            outputs.append(out)
    assert state is not None
    return torch.cat(outputs, dim=2), state, seen.get("native", 0)


def exact(attention, inputs, **more) -> Tensor:
    return attention.double().quadratic(*(x.double() for x in inputs), **more)


@pytest.mark.parametrize("form", CASES)
def test_it_is_the_definition_in_float64(compiler, make_shape, form):
    attention, inputs = hedgehog(make_shape, N=20, **CASES[form])
    out, _, steps = decoded(attention, inputs)
    assert steps == 19  # the first token has no state to go on from
    assert distance(out, exact(attention, inputs)) <= 6e-7


def test_a_long_text_stays_accurate(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, N=300, B=1, H=2, D=64, E=64)
    out, _, steps = decoded(attention, inputs)
    assert steps == 299 and distance(out, exact(attention, inputs)) <= 6e-7


@pytest.mark.parametrize("factor", [0.0, 7.0, 50.0, 1000.0])
def test_large_logits_neither_overflow_nor_vanish(compiler, make_shape, factor):
    attention, inputs = hedgehog(make_shape, B=2, N=40, H=2, D=64, E=64, factor=factor)
    out, _, steps = decoded(attention, inputs)
    # Rounding of the logits themselves is the error from here on, in any form.
    assert steps == 39 and distance(out, exact(attention, inputs)) <= 6e-7 * max(1.0, factor)


@pytest.mark.parametrize("form", ["auto", "quadratic", "chunked", "recurrent"])
@pytest.mark.parametrize("which", ["usual", "odd widths", "shared keys"])
def test_it_goes_on_from_the_state_of_any_form(compiler, make_shape, which, form):
    attention, inputs = hedgehog(make_shape, N=150, **CASES[which])
    with torch.inference_mode():
        _, state = attention(*(x[:, :, :140] for x in inputs), return_state=True, form=form)
    out, after, steps = decoded(attention, [x[:, :, 140:] for x in inputs], state)
    assert steps == 10 and after.num_attended.tolist() == [150, 150]
    assert distance(out, exact(attention, inputs)[:, :, 140:]) <= 6e-7
    with torch.inference_mode():  # and any form from its
        _, whole = attention(*inputs, return_state=True, form=form)
    assert distance(after.values, whole.values.double()) <= 1e-6 and distance(after.keys, whole.keys.double()) <= 1e-6


def test_masked_first_tokens(compiler, make_shape):
    """Padding takes the plain form; the compiled step goes on from the state that it left, empty or not."""
    attention, inputs = hedgehog(make_shape, B=2, N=12, H=2, D=16, E=16)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :6], mask[1, :2] = False, False
    padded, state, steps = decoded(attention, [x[:, :, :6] for x in inputs], key_mask=mask[:, :6])
    assert steps == 0
    out, after, steps = decoded(attention, [x[:, :, 6:] for x in inputs], state)
    assert steps == 6 and after.num_attended.tolist() == [6, 10]
    truth = exact(attention, inputs, key_mask=mask)
    assert distance(torch.cat([padded, out], 2), truth) <= 6e-7


def test_a_state_stays_as_it_is(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, N=9, H=2, D=16, E=16)
    _, state, _ = decoded(attention, [x[:, :, :8] for x in inputs])
    before = [x.clone() for x in (state.values, state.keys, state.log_max, state.num_attended)]
    token = [x[:, :, 8:] for x in inputs]
    first, after, steps = decoded(attention, token, state)
    assert steps == 1 and after.values.data_ptr() != state.values.data_ptr()
    for x, y in zip((state.values, state.keys, state.log_max, state.num_attended), before, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(decoded(attention, token, state)[0], first)
    assert not torch.equal(decoded(attention, token, after)[0], first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_stays_none(compiler, make_shape, which, value):
    attention, inputs = hedgehog(make_shape, B=2, N=3, H=2, D=16, E=16)
    inputs[which][0, 1, 2, 3] = value
    out, _, steps = decoded(attention, inputs)
    assert steps == 2 and not out[0, 1, 2].isfinite().all()
    assert out[:, 0].isfinite().all() and out[1].isfinite().all()


def test_tensors_that_are_not_contiguous(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, N=3, H=2, D=16, E=16)
    out, _, _ = decoded(attention, inputs)
    turned = [x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0) for x in inputs]
    found, _, steps = decoded(attention, turned)
    assert steps == 2 and torch.equal(found, out)


@pytest.mark.parametrize(
    "what",
    ["gradients", "float64", "bfloat16", "exp", "no negation", "wide", "one bias", "many threads", "not asked for"],
)
def test_what_it_does_not_serve_takes_the_plain_form(compiler, make_shape, monkeypatch, what):
    options = {"exp": {"activation": "exp"}, "no negation": {"negation": False}, "one bias": {"bias": True}}.get(
        what, {}
    )
    half = native.MOST + 1 if what == "wide" else 8
    attention, inputs = hedgehog(make_shape, B=2, N=5, H=2, D=8, E=8, half=half, **options)
    if what == "one bias":
        attention.key_map.bias = None
    if what in ("float64", "bfloat16"):
        inputs = [x.to(getattr(torch, what)) for x in inputs]
        attention = attention.double() if what == "float64" else attention
    if what == "many threads":
        monkeypatch.setattr(step, "MANY", 10)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if what == "not asked for":
        monkeypatch.delenv("HHBENCH_NATIVE")
    state, outputs = None, []
    with torch.set_grad_enabled(what == "gradients"), kernels() as seen:
        for i in range(5):
            out, state = attention(*(x[:, :, i : i + 1] for x in inputs), state=state, return_state=True)
            outputs.append(out)
    assert "native" not in seen
    out = torch.cat(outputs, 2)
    assert out.requires_grad == (what == "gradients")
    assert distance(out, exact(attention, inputs)) <= (1e-2 if what == "bfloat16" else 1e-6)


def test_without_a_compiler_the_plain_form(without_compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, N=4, H=2, D=8, E=8)
    out, _, steps = decoded(attention, inputs)
    assert steps == 0 and distance(out, exact(attention, inputs)) <= 1e-6


def test_a_state_that_does_not_fit_is_left_to_the_plain_form(compiler, make_shape, monkeypatch):
    """Memory beyond it is nobody's. A state of one sequence is broadcast; one of another attention is refused."""
    attention, inputs = hedgehog(make_shape, B=3, N=2, H=2, D=16, E=16)
    with torch.inference_mode(), kernels() as seen:
        _, state = attention(*(x[:1, :, :1] for x in inputs), return_state=True)
        token = [x[:, :, 1:] for x in inputs]
        out, _ = attention(*token, state=state, return_state=True)
        narrower, _ = hedgehog(make_shape, B=3, N=2, H=2, D=16, E=16, half=8)
        with pytest.raises(RuntimeError, match="size"):
            narrower(*token, state=state, return_state=True)
        monkeypatch.delenv("HHBENCH_NATIVE")
        assert torch.equal(out, attention(*token, state=state, return_state=True)[0])
    assert "native" not in seen


def test_what_torch_transforms_takes_the_plain_form(compiler, make_shape):
    """It doesn't see what C writes."""
    attention, inputs = hedgehog(make_shape, B=2, N=2, H=2, D=16, E=16)
    _, state = attention(*(x[:, :, :1] for x in inputs), return_state=True)
    token = [x[:, :, 1:] for x in inputs]

    def attend(*token: Tensor) -> Tensor:
        return attention(*token, state=state)

    with torch.no_grad(), kernels() as seen:
        one = attend(*token)
        assert seen.pop("native") == 1
        both = torch.func.vmap(attend)(*(torch.stack([x, x]) for x in token))
        _, tangent = torch.func.jvp(attend, tuple(token), tuple(torch.ones_like(x) for x in token))
    assert "native" not in seen
    assert distance(both, torch.stack([one, one])) <= 1e-6
    assert tangent.abs().max() > 0
