"""The contract: `hhbench check` over every registered attention, in every direction, with every option, and what it
leaves out: what is refused, specs, shapes and masks.

Nothing here names an attention. What one is asked follows from what it declares: its rung, `has_weights`, `has_state`,
its directions and its options.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hhbench.attention import (
    ATTENTIONS,
    Attention,
    AttentionSpec,
    build_attention,
    check_inputs,
    project,
    repeat_heads,
    token_positions,
    visible_keys,
)
from hhbench.check import B, Case, N, check
from hhbench.errors import HHBenchError, UsageError
from hhbench.linear_attention import LinearAttention

# Values to try for the options whose type does not say which there are. Give your option one here.
EXAMPLES: dict[str, list[Any]] = {
    "feature_dim": [3],
    "num_features": [3],
    "project_to": [3],
    "redraw_interval": [0],
    "temperature": [2.0],
    "window": [5],
    "d_state": [6],
    "emb_dim": [5],
    "filter_width": [8],
    "frequency": [2.0],
    "shift": [0.1],
}


def variants(spec: AttentionSpec) -> Iterator[dict[str, Any]]:
    """The defaults, then each option alone at each of its other values."""
    yield {}
    hints = typing.get_type_hints(spec.part.__init__)
    for option, default in spec.options.items():
        if isinstance(default, bool):
            values: list[Any] = [not default]
        elif typing.get_origin(hints.get(option)) is typing.Literal:
            values = [value for value in typing.get_args(hints[option]) if value != default]
        else:
            values = EXAMPLES.get(option, [])
        yield from ({option: value} for value in values)


def cases() -> Iterator[Case]:
    for name in ATTENTIONS.names():
        spec = ATTENTIONS.get(name)
        for direction in sorted(spec.directions):
            for options in variants(spec):
                yield Case(spec=spec, causal=direction == "causal", options=options)


def named(case: Case) -> str:
    return f"{case.spec.name}{''.join(f'-{name}={value}' for name, value in case.options.items())}-{case.direction}"


every_case = pytest.mark.parametrize("case", list(cases()), ids=named)
every_case_with_heads = pytest.mark.parametrize("case", [case for case in cases() if not case.is_mixer], ids=named)


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_every_option_has_a_value_to_try(name):
    spec = ATTENTIONS.get(name)
    tried = {option for options in variants(spec) for option in options}
    assert tried == spec.options.keys(), "give the option an example in EXAMPLES"


@every_case
def test_it_is_what_it_says_it_is(case):
    findings = check(case.spec, options=case.options, directions=[case.direction])
    assert [finding for finding in findings if finding.status == "FAIL"] == []


BAD_INPUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "heads of q": lambda x: [x[0][:, 1:], x[1], x[2]],
    "heads of k": lambda x: [x[0], x[1].repeat(1, 3, 1, 1), x[2]],
    "heads of v": lambda x: [x[0], x[1], x[2].repeat(1, 3, 1, 1)],
    "width of q": lambda x: [x[0][..., 1:], x[1], x[2]],
    "width of k": lambda x: [x[0], x[1][..., 1:], x[2]],
    "batch of k": lambda x: [x[0], x[1][1:], x[2][1:]],
    "tokens of v": lambda x: [x[0], x[1], x[2][:, :, 1:]],
    "more queries than keys": lambda x: [x[0], x[1][:, :, 1:], x[2][:, :, 1:]],
    "dimensions of q": lambda x: [x[0][0], x[1], x[2]],
    "dimensions of k": lambda x: [x[0], x[1][:, 0], x[2]],
    "dimensions of v": lambda x: [x[0], x[1], x[2][:, 0]],
}


@every_case_with_heads
@pytest.mark.parametrize("mistake", BAD_INPUTS)
def test_inputs_that_don_t_fit_are_refused(case, mistake):
    with pytest.raises(UsageError, match=r"must be|queries for"):
        case.build()(*BAD_INPUTS[mistake](case.inputs()))


@every_case
@pytest.mark.parametrize(
    "mask",
    [torch.ones(B, N), torch.ones(B, N, dtype=torch.long)]
    + [torch.ones(*shape, dtype=torch.bool) for shape in ((B, N - 1), (1, N), (B, 1, 1, N), (N,))],
    ids=["float", "int", "short", "batch of one", "4-D", "1-D"],
)
def test_a_key_mask_that_doesn_t_fit_is_refused(case, mask):
    module, inputs = case.build(), case.inputs()
    with pytest.raises(UsageError, match="key_mask must be bool"):
        module(*inputs, key_mask=mask)
    if case.has_weights:
        with pytest.raises(UsageError, match="key_mask must be bool"):
            module.weights(*inputs[:2], key_mask=mask)


@every_case
def test_flops_are_stated_and_grow_as_the_cost_says(case):
    """With the batch in a straight line: what sequences share counts once. With the tokens as N, N log N or N^2."""
    case = case.at(head_dim=16, max_len=2**17)
    shape = case.at(max_len=64).shape  # as many positions as are learned; flops asks for none
    module = case.spec.build(shape, **case.options)
    one, two, three = (module.flops(500, 500, batch_size=size) for size in (1, 2, 3))
    assert all(isinstance(flops, int) for flops in (one, two, three))
    assert 0 < two - one <= one
    assert abs((three - two) - (two - one)) <= 1
    growth = module.flops(2**17, 2**17) / module.flops(2**16, 2**16)
    quadratic = case.spec.cost.startswith("N^2") or case.options.get("variant") == "full"
    assert growth == pytest.approx(4, rel=0.01) if quadratic else 2 <= growth < 2.2
    last = module.flops(1, 500)
    assert 0 < last <= module.flops(500, 500)
    if case.causal and module.has_state:
        assert last == pytest.approx(module.flops(1, 5000), rel=0.01)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["softmax", "t2r", "hedgehog"])
def test_flops_are_torch_s_own_count_of_the_same_products(name, causal, make_shape):
    """Of softmax's two products over all pairs, and of the maps of a linear attention."""
    shape = make_shape(num_heads=4, num_kv_heads=2, head_dim=16, causal=causal)
    module = build_attention(name, shape)
    q, k = torch.randn(3, 4, 20, 16), torch.randn(3, 2, 20, 16)
    with FlopCounterMode(display=False) as counter:
        if isinstance(module, LinearAttention):
            module.query_map.map_queries(q, positions=torch.arange(20).expand(3, 20))
            stated = 3 * module.query_map.flops(20)
        else:
            module.quadratic(q, k, k)
            stated = module.flops(20, 20, batch_size=3)
            stated = stated * 400 // 210 if causal else stated  # the quadratic form computes the future's pairs too
    assert counter.get_total_flops() == stated


# --- specs ---


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_a_spec_describes_itself(name):
    spec = ATTENTIONS.get(name)
    assert spec.name == name
    assert spec.paper and spec.cost and spec.part.__doc__
    assert spec.directions and spec.directions <= {"causal", "bidirectional"}
    assert spec.convertible == (spec.rung != "SequenceMixer")
    assert spec.label({}) == spec.label(spec.options) == name
    for options in variants(spec):
        for option, value in options.items():
            assert spec.label(options) == f"{name}[{option}={value}]"


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_an_unknown_option_is_answered_with_the_nearest(name, make_shape):
    spec = ATTENTIONS.get(name)
    shape = make_shape(causal="causal" in spec.directions)
    for option in spec.options:
        with pytest.raises(UsageError, match=f"no option of {name} named '{option}x'. Did you mean '{option}'"):
            spec.build(shape, **{f"{option}x": 1})
    with pytest.raises(UsageError, match=f"no option of {name} named 'nonsense'"):
        spec.build(shape, nonsense=1)


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_a_direction_that_isn_t_served_is_refused(name, make_shape):
    spec = ATTENTIONS.get(name)
    for served, other in (("causal", "bidirectional"), ("bidirectional", "causal")):
        narrow = dataclasses.replace(spec, directions=frozenset({served}))
        with pytest.raises(UsageError, match=f"{name} has no {other} form; it is {served}"):
            narrow.build(make_shape(causal=other == "causal"))


def test_build_attention_is_the_spec_s_build(make_shape):
    name = ATTENTIONS.names()[0]
    shape = make_shape()
    built, expected = build_attention(name, shape), ATTENTIONS.get(name).build(shape)
    assert type(built) is type(expected)
    with pytest.raises(UsageError, match="no attention named"):
        build_attention("no-such-attention", shape)


# --- shapes, masks and positions ---


@pytest.mark.parametrize("field", ["dim", "num_heads", "num_kv_heads", "head_dim", "max_len"])
def test_a_shape_has_no_zero_width(field, make_shape):
    with pytest.raises(UsageError, match=f"{field} must be at least 1"):
        dataclasses.replace(make_shape(), **{field: 0})


def test_query_heads_share_key_heads_evenly(make_shape):
    with pytest.raises(UsageError, match="4 query heads can't share 3"):
        make_shape(num_heads=4, num_kv_heads=3)
    heads = torch.arange(2.0).view(1, 2, 1, 1)
    assert repeat_heads(heads, 4).flatten().tolist() == [0, 0, 1, 1]


def test_positions_count_attended_tokens():
    cpu = torch.device("cpu")
    assert token_positions(None, batch_size=2, length=3, device=cpu).tolist() == [[0, 1, 2], [0, 1, 2]]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    found = token_positions(mask, batch_size=3, length=4, device=cpu)
    assert found[mask].tolist() == [0, 1, 0, 1, 0, 1]


def test_visible_keys_are_past_and_attended():
    cpu = torch.device("cpu")
    mask = torch.tensor([[False, True, True]])

    def see(mask: Tensor | None, causal: bool, num_queries: int) -> list | None:
        found = visible_keys(mask, causal=causal, num_queries=num_queries, num_keys=3, device=cpu)
        return None if found is None else found.expand(1, 1, num_queries, 3)[0, 0].int().tolist()

    assert see(None, False, 3) is None
    assert see(None, True, 1) is None  # the last token sees all
    assert see(None, True, 2) == [[1, 1, 0], [1, 1, 1]]
    assert see(mask, False, 2) == [[0, 1, 1], [0, 1, 1]]
    assert see(mask, True, 3) == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("N", [0, 1, 4])
@pytest.mark.parametrize("B", [1, 2])
def test_project_is_the_product_of_each_head(B, N, heads):
    x = torch.randn(B, 3, N, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(heads, 5, 2, requires_grad=True)
    found, expected = project(x, weight), torch.einsum("bhnd,hdf->bhnf", x, weight.double().expand(3, 5, 2))
    torch.testing.assert_close(found, expected)
    given = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), given) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_check_inputs_takes_values_of_any_width(make_shape):
    q = torch.zeros(1, 2, 3, 4)
    check_inputs(make_shape(), q, q, torch.zeros(1, 2, 3, 9), None)
    check_inputs(make_shape(), q[:, :, 2:], q, None, torch.ones(1, 3, dtype=torch.bool))


def test_the_base_classes_promise_nothing_they_can_t_hold(make_shape):
    class Passing(Attention):
        def forward(self, q, k, v, *, key_mask=None, positions=None):
            return v

    module = Passing(make_shape())
    assert isinstance(module, nn.Module)
    assert module.state_bytes(10) is None
    with pytest.raises(HHBenchError, match="Passing has no attention weights"):
        module.weights(torch.zeros(1), torch.zeros(1))
