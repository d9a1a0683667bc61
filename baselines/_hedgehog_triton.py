"""Hedgehog's feature map and its sums in fused Triton kernels: forward and backward, causal and bidirectional, on CUDA.

Features never reach memory: each tile of q and k is mapped where it is used, and mapped again in the backward pass.
What is kept from forward to backward is the output, the normalisers, and one state for each part of a sequence.

    state     S = sum_j phi(k_j) v_j^T  [P, E]  and  z = sum_j phi(k_j)  [P],  P = 2F with negation
    forward   out_i = S^T phi(q_i) / z.phi(q_i), a triangle within a tile of tokens, and S and z from the tiles before
    backward  the same sweep again for the queries; the reverse sweep, with the sums over later queries, for the keys

Each head of each sequence is one program as long as that fills the card. Otherwise a sequence is split into parts: one
kernel sums each part, a short cumulative sum turns the sums into the states before the parts, and then the parts run at
once. The bidirectional form is the same without the triangle: every tile reads the state of the whole sequence.

States, softmax and normalisers are float32. Products take bfloat16 operands for bfloat16 inputs and TF32 ones for
float16, which can't hold a feature at the floor; float32 inputs get three TF32 products for one, or one TF32 product
where `torch.set_float32_matmul_precision` allows it.

**Not run on a GPU yet.** The kernels are tested under Triton's interpreter, and they compile for sm_80 and sm_90. They
stay off unless HHBENCH_TRITON=1 is set; `scripts/gpu.sh` is what to run on a GPU, and then this line goes.
"""

# Arguments of kernels are pointers, strides and sizes by their names; Triton gives them no types that a checker knows.
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hhbench.attention import repeat_heads
from hhbench.linear_sum import FLOOR

WIDTHS = (16, 32, 64, 128)  # of D, F and E: what a tile of a tensor-core product can be
ACTIVATIONS = ("softmax", "joint-softmax")
_FLOOR = tl.constexpr(FLOOR)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _load(pointer: tl.tensor, rows: tl.tensor, stride: tl.tensor, inside: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """Rows [C, width] of a matrix; zeros where they are not inside. Padded rows may hold NaN."""
    columns = tl.arange(0, width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _store(
    pointer: tl.tensor, rows: tl.tensor, stride: tl.tensor, inside: tl.tensor, tile: tl.tensor, width: tl.constexpr
) -> None:
    columns = tl.arange(0, width)
    where = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(where, tile.to(pointer.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, DTYPE: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    a = a.to(DTYPE)
    b = b.to(DTYPE)
    if _INTERPRETED:  # it multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _attended(tokens: tl.tensor, mask_ptr: tl.tensor, N: tl.tensor, HAS_MASK: tl.constexpr) -> tl.tensor:
    """Which of these tokens exist and are not padded."""
    attended = tokens < N
    if HAS_MASK:
        attended = attended & (tl.load(mask_ptr + tokens, mask=attended, other=0) != 0)
    return attended


@triton.jit
def _features(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    NEGATION: tl.constexpr,
    JOINT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """phi of a tile, [C, D] -> float32 [C, P]. The two halves alternate: no sum over features minds their order."""
    y = _dot(x, weight, DTYPE, PRECISION) + bias[None, :]
    if JOINT:
        y *= 2
    high = tl.max(y, 1)
    if NEGATION:
        low = tl.min(y, 1)
        if JOINT:
            high = tl.maximum(high, -low)
            low = -high
        up = tl.exp(y - high[:, None])
        down = tl.exp(low[:, None] - y)
        up_total = tl.sum(up, 1)
        down_total = tl.sum(down, 1)
        if JOINT:
            up_total += down_total
            down_total = up_total
        halves = tl.join(up / up_total[:, None], down / down_total[:, None])
        features = tl.reshape(halves, (y.shape[0], 2 * y.shape[1]))
    else:
        up = tl.exp(y - high[:, None])
        features = up / tl.sum(up, 1)[:, None]
    return tl.maximum(features, _FLOOR)


@triton.jit
def _features_backward(
    features: tl.tensor, gradient: tl.tensor, NEGATION: tl.constexpr, JOINT: tl.constexpr
) -> tl.tensor:
    """The gradient of y = x W + b [C, F], from features and their gradient [C, P]. The floor lets none through."""
    gradient = tl.where(features.to(tl.float32) > 1.01 * _FLOOR, gradient, 0.0)  # FLOOR as bfloat16 lies above it
    weighted = features.to(tl.float32) * gradient
    if NEGATION:
        shape: tl.constexpr = (features.shape[0], features.shape[1] // 2, 2)
        up, down = tl.split(tl.reshape(features, shape))
        up = up.to(tl.float32)
        down = down.to(tl.float32)
        weighted_up, weighted_down = tl.split(tl.reshape(weighted, shape))
        mean_up = tl.sum(weighted_up, 1)
        mean_down = tl.sum(weighted_down, 1)
        if JOINT:
            mean_up += mean_down
            mean_down = mean_up
        dy = (weighted_up - up * mean_up[:, None]) - (weighted_down - down * mean_down[:, None])
    else:
        dy = weighted - features.to(tl.float32) * tl.sum(weighted, 1)[:, None]
    if JOINT:
        dy *= 2
    return dy


@triton.jit
def _program(PARTS: tl.constexpr, VALUE_BLOCKS: tl.constexpr, H: tl.tensor, GROUP: tl.tensor) -> tl.tensor:
    """Which part, block of values, sequence and head this program has; int64 where they multiply strides."""
    program = tl.program_id(0)
    block = program % VALUE_BLOCKS
    part = program // VALUE_BLOCKS % PARTS
    stream = (program // VALUE_BLOCKS // PARTS).to(tl.int64)
    batch = stream // H
    head = stream % H
    return part, block, stream, batch, head, head // GROUP


@triton.jit
def _weights(
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    head: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """W_h [D, F] and b_h [F] of one head."""
    columns = tl.arange(0, F)
    weight = tl.load(weight_ptr + head * D * F + tl.arange(0, D)[:, None] * F + columns[None, :]).to(DTYPE)
    if HAS_BIAS:  # noqa: SIM108  # one branch must not compile
        bias = tl.load(bias_ptr + head * F + columns).to(tl.float32)
    else:
        bias = tl.zeros((F,), tl.float32)
    return weight, bias


@triton.jit
def _load_state(
    values_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    entry: tl.tensor,
    block: tl.tensor,
    P: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FROM_STATE: tl.constexpr,
) -> tl.tensor:
    """One entry of the states, for a block of values: sums [P, BLOCK_E] and [P]; zeros if nothing came before."""
    if FROM_STATE:
        rows = tl.arange(0, P)
        columns = block * BLOCK_E + tl.arange(0, BLOCK_E)
        values = tl.load(values_ptr + entry * P * E + rows[:, None] * E + columns[None, :])
        keys = tl.load(keys_ptr + (entry * (E // BLOCK_E) + block) * P + rows)
    else:
        values = tl.zeros((P, BLOCK_E), tl.float32)
        keys = tl.zeros((P,), tl.float32)
    return values, keys


@triton.jit
def _output_gradient(
    do_ptr: tl.tensor,
    do_n: tl.tensor,
    den_ptr: tl.tensor,
    tokens: tl.tensor,
    inside: tl.tensor,
    BLOCK_E: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The gradient of the numerators [C, BLOCK_E]: do / den, and zero where a query had no key to attend to."""
    den = tl.load(den_ptr + tokens, mask=inside, other=0.0)
    inverse = tl.where(den > 0, 1 / tl.where(den > 0, den, 1.0), 0.0)
    return (_load(do_ptr, tokens, do_n, inside, BLOCK_E).to(tl.float32) * inverse[:, None]).to(DTYPE)


@triton.jit
def _sums_kernel(
    x_ptr, x_b, x_h, x_n, y_ptr, y_b, y_h, y_n, den_ptr, delta_ptr, mask_ptr, weight_ptr, bias_ptr,
    values_ptr, keys_ptr, H, GROUP, N, PART,
    PARTS: tl.constexpr, OF_QUERIES: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NEGATION: tl.constexpr, JOINT: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, BLOCK_E: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens of a part: of keys and their values, or of queries and the gradients of their sums.

    Causal, entry t of the states is to hold what came before part t; of queries, what comes after part t from the end.
    So each part writes one entry further, and the last one has nothing but entry 0 to clear.
    """
    part, block, stream, batch, head, group = _program(PARTS, E // BLOCK_E, H, GROUP)
    entry = part
    if CAUSAL:
        entry = (part + 1) % PARTS
        if OF_QUERIES:
            part = PARTS - 1 - part
    first = part * PART
    end = min(first + PART, N)
    if CAUSAL:
        end = tl.where(entry == 0, first, end)
    x_head = group
    if OF_QUERIES:
        x_head = head
    x_ptr += batch * x_b + x_head * x_h
    y_ptr += batch * y_b + x_head * y_h + block * BLOCK_E
    den_ptr += stream * N
    delta_ptr += (stream * (E // BLOCK_E) + block) * N
    mask_ptr += batch * N
    weight, bias = _weights(weight_ptr, bias_ptr, head, D, F, HAS_BIAS, DTYPE)
    values = tl.zeros((P, BLOCK_E), tl.float32)
    keys = tl.zeros((P,), tl.float32)
    for start in range(first, end, C):
        tokens = start + tl.arange(0, C)
        inside = tokens < N
        attended = _attended(tokens, mask_ptr, N, HAS_MASK)
        x = _load(x_ptr, tokens, x_n, attended, D)
        features = _features(x, weight, bias, NEGATION, JOINT, DTYPE, PRECISION)
        if OF_QUERIES:
            features = features.to(DTYPE)
            y = _output_gradient(y_ptr, y_n, den_ptr, tokens, inside, BLOCK_E, DTYPE)
            delta = tl.load(delta_ptr + tokens, mask=inside, other=0.0)
            keys += tl.sum(features.to(tl.float32) * delta[:, None], 0)
        else:
            features = tl.where(attended[:, None], features, 0.0).to(DTYPE)
            y = _load(y_ptr, tokens, y_n, attended, BLOCK_E)
            keys += tl.sum(features.to(tl.float32), 0)
        values += _dot(tl.trans(features), y, DTYPE, PRECISION)
    rows = tl.arange(0, P)
    columns = block * BLOCK_E + tl.arange(0, BLOCK_E)
    entry = stream * PARTS + entry
    tl.store(values_ptr + entry * P * E + rows[:, None] * E + columns[None, :], values)
    tl.store(keys_ptr + (entry * (E // BLOCK_E) + block) * P + rows, keys)


@triton.jit
def _forward_kernel(
    q_ptr, q_b, q_h, q_n, k_ptr, k_b, k_h, k_n, v_ptr, v_b, v_h, v_n, out_ptr, out_b, out_h, out_n, den_ptr, mask_ptr,
    weight_q_ptr, weight_k_ptr, bias_q_ptr, bias_k_ptr, values_ptr, keys_ptr, H, GROUP, N, PART,
    PARTS: tl.constexpr, CAUSAL: tl.constexpr, FROM_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NEGATION: tl.constexpr, JOINT: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, BLOCK_E: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and normalisers of a part."""
    part, block, stream, batch, head, group = _program(PARTS, E // BLOCK_E, H, GROUP)
    q_ptr += batch * q_b + head * q_h
    k_ptr += batch * k_b + group * k_h
    v_ptr += batch * v_b + group * v_h + block * BLOCK_E
    out_ptr += batch * out_b + head * out_h + block * BLOCK_E
    den_ptr += stream * N
    mask_ptr += batch * N
    weight_q, bias_q = _weights(weight_q_ptr, bias_q_ptr, head, D, F, HAS_BIAS, DTYPE)
    if CAUSAL:
        weight_k, bias_k = _weights(weight_k_ptr, bias_k_ptr, head, D, F, HAS_BIAS, DTYPE)
        entry = stream * PARTS + part
    else:
        entry = stream
    values, keys = _load_state(values_ptr, keys_ptr, entry, block, P, E, BLOCK_E, FROM_STATE)
    first = part * PART
    for start in range(first, min(first + PART, N), C):
        tokens = start + tl.arange(0, C)
        inside = tokens < N
        attended = _attended(tokens, mask_ptr, N, HAS_MASK)
        q = _load(q_ptr, tokens, q_n, attended, D)
        fq = _features(q, weight_q, bias_q, NEGATION, JOINT, DTYPE, PRECISION).to(DTYPE)
        numerator = _dot(fq, values, DTYPE, PRECISION)
        den = tl.sum(fq.to(tl.float32) * keys[None, :], 1)
        if CAUSAL:
            k = _load(k_ptr, tokens, k_n, attended, D)
            v = _load(v_ptr, tokens, v_n, attended, BLOCK_E)
            fk = _features(k, weight_k, bias_k, NEGATION, JOINT, DTYPE, PRECISION)
            fk = tl.where(attended[:, None], fk, 0.0).to(DTYPE)
            scores = _dot(fq, tl.trans(fk), DTYPE, PRECISION)
            scores = tl.where(tokens[:, None] >= tokens[None, :], scores, 0.0)
            numerator += _dot(scores, v, DTYPE, PRECISION)
            den += tl.sum(scores, 1)
            values += _dot(tl.trans(fk), v, DTYPE, PRECISION)
            keys += tl.sum(fk.to(tl.float32), 0)
        out = numerator / tl.where(den > 0, den, 1.0)[:, None]
        _store(out_ptr, tokens, out_n, inside, out, BLOCK_E)
        tl.store(den_ptr + tokens, den, mask=inside)


@triton.jit
def _backward_queries_kernel(
    q_ptr, q_b, q_h, q_n, k_ptr, k_b, k_h, k_n, v_ptr, v_b, v_h, v_n, out_ptr, out_b, out_h, out_n,
    do_ptr, do_b, do_h, do_n, den_ptr, delta_ptr, mask_ptr, weight_q_ptr, weight_k_ptr, bias_q_ptr, bias_k_ptr,
    values_ptr, keys_ptr, dq_ptr, dq_e, dq_b, dq_h, dq_n, dweight_ptr, dbias_ptr, H, GROUP, N, PART,
    PARTS: tl.constexpr, CAUSAL: tl.constexpr, FROM_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NEGATION: tl.constexpr, JOINT: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, BLOCK_E: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a part's queries, of their map, and of the normalisers (delta), each from one block of values.

    All are linear in the gradients of numerators and normalisers, so that the blocks' shares add up.
    """
    part, block, stream, batch, head, group = _program(PARTS, E // BLOCK_E, H, GROUP)
    q_ptr += batch * q_b + head * q_h
    k_ptr += batch * k_b + group * k_h
    v_ptr += batch * v_b + group * v_h + block * BLOCK_E
    out_ptr += batch * out_b + head * out_h + block * BLOCK_E
    do_ptr += batch * do_b + head * do_h + block * BLOCK_E
    dq_ptr += block * dq_e + batch * dq_b + head * dq_h
    den_ptr += stream * N
    delta_ptr += (stream * (E // BLOCK_E) + block) * N
    mask_ptr += batch * N
    weight_q, bias_q = _weights(weight_q_ptr, bias_q_ptr, head, D, F, HAS_BIAS, DTYPE)
    if CAUSAL:
        weight_k, bias_k = _weights(weight_k_ptr, bias_k_ptr, head, D, F, HAS_BIAS, DTYPE)
        entry = stream * PARTS + part
    else:
        entry = stream
    values, keys = _load_state(values_ptr, keys_ptr, entry, block, P, E, BLOCK_E, FROM_STATE)
    dweight = tl.zeros((D, F), tl.float32)
    dbias = tl.zeros((F,), tl.float32)
    first = part * PART
    for start in range(first, min(first + PART, N), C):
        tokens = start + tl.arange(0, C)
        inside = tokens < N
        attended = _attended(tokens, mask_ptr, N, HAS_MASK)
        out = _load(out_ptr, tokens, out_n, inside, BLOCK_E).to(tl.float32)
        dn = _output_gradient(do_ptr, do_n, den_ptr, tokens, inside, BLOCK_E, DTYPE)
        delta = -tl.sum(dn.to(tl.float32) * out, 1)
        tl.store(delta_ptr + tokens, delta, mask=inside)
        dfq = _dot(dn, tl.trans(values), DTYPE, PRECISION) + delta[:, None] * keys[None, :]
        if CAUSAL:
            k = _load(k_ptr, tokens, k_n, attended, D)
            v = _load(v_ptr, tokens, v_n, attended, BLOCK_E)
            fk = _features(k, weight_k, bias_k, NEGATION, JOINT, DTYPE, PRECISION)
            fk = tl.where(attended[:, None], fk, 0.0).to(DTYPE)
            dscores = _dot(dn, tl.trans(v), DTYPE, PRECISION) + delta[:, None]
            dscores = tl.where(tokens[:, None] >= tokens[None, :], dscores, 0.0)
            dfq += _dot(dscores, fk, DTYPE, PRECISION)
            values += _dot(tl.trans(fk), v, DTYPE, PRECISION)
            keys += tl.sum(fk.to(tl.float32), 0)
        q = _load(q_ptr, tokens, q_n, attended, D)
        fq = _features(q, weight_q, bias_q, NEGATION, JOINT, DTYPE, PRECISION).to(DTYPE)
        dy = _features_backward(fq, dfq, NEGATION, JOINT)
        dbias += tl.sum(dy, 0)
        dweight += _dot(tl.trans(q), dy, DTYPE, PRECISION)
        dq = tl.where(attended[:, None], _dot(dy, tl.trans(weight_q), DTYPE, PRECISION), 0.0)
        _store(dq_ptr, tokens, dq_n, inside, dq, D)
    share = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, F)
    tl.store(dweight_ptr + share * D * F + tl.arange(0, D)[:, None] * F + columns[None, :], dweight)
    if HAS_BIAS:
        tl.store(dbias_ptr + share * F + columns, dbias)


@triton.jit
def _backward_keys_kernel(
    q_ptr, q_b, q_h, q_n, k_ptr, k_b, k_h, k_n, v_ptr, v_b, v_h, v_n, do_ptr, do_b, do_h, do_n,
    den_ptr, delta_ptr, mask_ptr, weight_q_ptr, weight_k_ptr, bias_q_ptr, bias_k_ptr, values_ptr, keys_ptr,
    dk_ptr, dk_e, dk_b, dk_h, dk_n, dv_ptr, dv_b, dv_h, dv_n, dweight_ptr, dbias_ptr, H, GROUP, N, PART,
    PARTS: tl.constexpr, CAUSAL: tl.constexpr, FROM_STATE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NEGATION: tl.constexpr, JOINT: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, BLOCK_E: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a part's keys and values and of the keys' map, from its last tile to its first."""
    part, block, stream, batch, head, group = _program(PARTS, E // BLOCK_E, H, GROUP)
    q_ptr += batch * q_b + head * q_h
    k_ptr += batch * k_b + group * k_h
    v_ptr += batch * v_b + group * v_h + block * BLOCK_E
    do_ptr += batch * do_b + head * do_h + block * BLOCK_E
    dk_ptr += block * dk_e + batch * dk_b + head * dk_h
    dv_ptr += batch * dv_b + head * dv_h + block * BLOCK_E
    den_ptr += stream * N
    delta_ptr += (stream * (E // BLOCK_E) + block) * N
    mask_ptr += batch * N
    weight_k, bias_k = _weights(weight_k_ptr, bias_k_ptr, head, D, F, HAS_BIAS, DTYPE)
    if CAUSAL:
        weight_q, bias_q = _weights(weight_q_ptr, bias_q_ptr, head, D, F, HAS_BIAS, DTYPE)
        entry = stream * PARTS + PARTS - 1 - part
    else:
        entry = stream
    dvalues, dkeys = _load_state(values_ptr, keys_ptr, entry, block, P, E, BLOCK_E, FROM_STATE)
    dweight = tl.zeros((D, F), tl.float32)
    dbias = tl.zeros((F,), tl.float32)
    first = part * PART
    tiles = tl.cdiv(min(PART, N - first), C)
    for i in range(0, tiles):
        tokens = first + (tiles - 1 - i) * C + tl.arange(0, C)
        inside = tokens < N
        attended = _attended(tokens, mask_ptr, N, HAS_MASK)
        k = _load(k_ptr, tokens, k_n, attended, D)
        v = _load(v_ptr, tokens, v_n, attended, BLOCK_E)
        fk = _features(k, weight_k, bias_k, NEGATION, JOINT, DTYPE, PRECISION)
        fk = tl.where(attended[:, None], fk, 0.0).to(DTYPE)
        dv = _dot(fk, dvalues, DTYPE, PRECISION)
        dfk = _dot(v, tl.trans(dvalues), DTYPE, PRECISION) + dkeys[None, :]
        if CAUSAL:
            q = _load(q_ptr, tokens, q_n, attended, D)
            fq = _features(q, weight_q, bias_q, NEGATION, JOINT, DTYPE, PRECISION).to(DTYPE)
            dn = _output_gradient(do_ptr, do_n, den_ptr, tokens, inside, BLOCK_E, DTYPE)
            delta = tl.load(delta_ptr + tokens, mask=inside, other=0.0)
            earlier = tokens[:, None] <= tokens[None, :]  # key, query
            scores = tl.where(earlier, _dot(fk, tl.trans(fq), DTYPE, PRECISION), 0.0)
            dv += _dot(scores, dn, DTYPE, PRECISION)
            dscores = tl.where(earlier, _dot(v, tl.trans(dn), DTYPE, PRECISION) + delta[None, :], 0.0)
            dfk += _dot(dscores, fq, DTYPE, PRECISION)
            dvalues += _dot(tl.trans(fq), dn, DTYPE, PRECISION)
            dkeys += tl.sum(fq.to(tl.float32) * delta[:, None], 0)
        dy = _features_backward(fk, dfk, NEGATION, JOINT)  # zero at padded keys, whose features are
        dbias += tl.sum(dy, 0)
        dweight += _dot(tl.trans(k), dy, DTYPE, PRECISION)
        _store(dk_ptr, tokens, dk_n, inside, _dot(dy, tl.trans(weight_k), DTYPE, PRECISION), D)
        _store(dv_ptr, tokens, dv_n, inside, dv, BLOCK_E)
    share = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, F)
    tl.store(dweight_ptr + share * D * F + tl.arange(0, D)[:, None] * F + columns[None, :], dweight)
    if HAS_BIAS:
        tl.store(dbias_ptr + share * F + columns, dbias)


@dataclass(frozen=True)
class Tiling:
    """How a kernel is laid out on the card; results don't depend on it but for rounding.

    Attributes:
        tokens: C, tokens a tile.
        values: columns of v that a program takes; the others are other programs', which map the features again.
        warps, stages: of Triton, per program and of its pipeline.
    """

    tokens: int
    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """One kernel with all that it is called with, on tensors of any device: to run, or only to compile."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiling: Tiling

    def run(self) -> None:
        tiling = {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages}
        self.kernel[(self.programs,)](**self.arguments, **self.constants, **tiling)


MAX_TOKENS = 64  # a part is whole tiles of every kernel
MIN_PART = 256  # tokens; below it, states cost more than they spare


def value_block(P: int, half: bool) -> int:
    """Columns of a state that one program can hold in its registers beside the rest."""
    return 64 if half and P == 128 else 32


def tiling_of(kernel: Any, P: int, block: int, half: bool) -> Tiling:
    """Chosen by what ptxas says of registers and shared memory for sm_80 and sm_90; not timed on any card."""
    if half and P <= 64:
        return Tiling(32, block, 4, 2)
    if half and P == 128 and kernel is not _backward_keys_kernel:
        return Tiling(32, block, 8, 2)
    return Tiling(16, block, 8, 1)


def shared_memory(P: int, half: bool) -> int:
    """Bytes of shared memory that the kernels need at most: what all GPUs since sm_80 have, or what an A100 has."""
    return 99 << 10 if (half and P <= 128) or P <= 64 else 163 << 10


@dataclass(frozen=True)
class Options:
    """What is computed, and in how many parts (None: as many as fill the card)."""

    causal: bool
    negation: bool = True
    joint: bool = False
    parts: int | None = None


class Problem:
    """One attention on given tensors: plans the launches of its passes and hands them to `run`.

    Args:
        q: [B, H, N, D], last dimension contiguous as in all others.
        k: [B, G, N, D], G divides H.
        v: [B, G, N, E].
        weights: W of queries and of keys, [H, D, F].
        biases: of both, [H, F], or two None.
        key_mask: bool [B, N] or None.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        key_mask: Tensor | None,
        options: Options,
        run: Callable[[Launch], None] = Launch.run,
    ) -> None:
        self.q, self.k, self.v, self.options, self.run = q, k, v, options, run
        self.B, self.H, self.N, self.D = q.shape
        self.G, self.E = v.shape[1], v.shape[3]
        self.F = weights[0].shape[2]
        self.P = 2 * self.F if options.negation else self.F
        self.half = q.dtype == torch.bfloat16
        self.block = min(self.E, value_block(self.P, self.half))
        self.blocks = self.E // self.block
        self.part, self.parts = self._split()
        unused = weights[0]
        self.maps: dict[str, Any] = {
            "mask_ptr": unused if key_mask is None else key_mask.contiguous().view(torch.uint8),
            "H": self.H,
            "GROUP": self.H // self.G,
            "N": self.N,
            "PART": self.part,
        }
        for letter, weight, bias in zip("qk", weights, biases, strict=True):
            self.maps[f"weight_{letter}_ptr"] = weight
            self.maps[f"bias_{letter}_ptr"] = unused if bias is None else bias
        exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        self.constants: dict[str, Any] = {
            "PARTS": self.parts,
            "CAUSAL": options.causal,
            "FROM_STATE": not options.causal or self.parts > 1,
            "HAS_MASK": key_mask is not None,
            "HAS_BIAS": biases[0] is not None,
            "NEGATION": options.negation,
            "JOINT": options.joint,
            "D": self.D,
            "F": self.F,
            "P": self.P,
            "E": self.E,
            "BLOCK_E": self.block,
            "DTYPE": tl.bfloat16 if self.half else tl.float32,
            "PRECISION": "tf32x3" if exact else "tf32",
        }

    def forward(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Outputs [B, H, N, E], normalisers [B, H, N], and the states before each part, for `backward`."""
        out = torch.empty_like(self.q) if self.E == self.D else self.q.new_empty(self.B, self.H, self.N, self.E)
        den = self._new(self.B, self.H, self.N)
        states = self._states(False, _strided("x", self.k) | _strided("y", self.v), den, den)
        inputs = _strided("q", self.q) | _strided("k", self.k) | _strided("v", self.v)
        self._launch(_forward_kernel, inputs | _strided("out", out) | {"den_ptr": den} | _named(states))
        return out, den, states

    def backward(
        self, out: Tensor, den: Tensor, states: tuple[Tensor, Tensor], do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Gradients of q, k and v, of both weights, and of both biases (without meaning if there are none)."""
        B, H, N, shares = self.B, self.H, self.N, self.blocks * self.parts
        delta = self._new(B, H, self.blocks, N)
        dweights = self._new(2, B, H, shares, self.D, self.F)
        dbiases = self._new(2, B, H, shares, self.F)
        inputs = _strided("q", self.q) | _strided("k", self.k) | _strided("v", self.v) | _strided("do", do)
        inputs |= {"den_ptr": den, "delta_ptr": delta}
        dq = self._gradient(self.q, self.blocks)
        maps = {"dweight_ptr": dweights[0], "dbias_ptr": dbiases[0]}
        outputs = _strided("out", out) | _strided("dq", dq) | maps | _named(states)
        self._launch(_backward_queries_kernel, inputs | outputs)
        states = self._states(True, _strided("x", self.q) | _strided("y", do), den, delta)
        dk, dv = self._gradient(self.k, self.blocks), self._gradient(self.v, 1)
        maps = {"dweight_ptr": dweights[1], "dbias_ptr": dbiases[1]}
        outputs = _strided("dk", dk) | _strided("dv", dv[0]) | maps | _named(states)
        self._launch(_backward_keys_kernel, inputs | outputs)
        dweight_q, dweight_k = dweights.sum((1, 3))
        dbias_q, dbias_k = dbiases.sum((1, 3))
        dq, dk, dv = self._total(dq, self.q), self._total(dk, self.k), self._total(dv, self.v)
        return dq, dk, dv, (dweight_q, dweight_k), (dbias_q, dbias_k)

    def _states(self, of_queries: bool, inputs: dict[str, Any], den: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [B H, parts, P, E] and [B H, parts, blocks, P] before each part; [B H, 1, ...] of a whole sequence."""
        parts = self.parts if self.constants["FROM_STATE"] else 0
        values = self._new(self.B * self.H, parts, self.P, self.E)
        keys = self._new(self.B * self.H, parts, self.blocks, self.P)
        if not parts:
            return values, keys
        letter = "q" if of_queries else "k"
        maps = {f"{name}_ptr": self.maps[f"{name}_{letter}_ptr"] for name in ("weight", "bias")}
        arguments = inputs | {"den_ptr": den, "delta_ptr": delta} | maps | _named((values, keys))
        self._launch(_sums_kernel, arguments, OF_QUERIES=of_queries)
        if self.options.causal:
            return values.cumsum(1), keys.cumsum(1)
        return values.sum(1, keepdim=True), keys.sum(1, keepdim=True)

    def _launch(self, kernel: Any, arguments: dict[str, Any], **constants: Any) -> None:
        tiling = tiling_of(kernel, self.P, self.block, self.half)
        arguments = {name: value for name, value in (self.maps | arguments).items() if name in kernel.arg_names}
        constants = {"C": tiling.tokens, **self.constants, **constants}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        self.run(Launch(kernel, self.B * self.H * self.parts * self.blocks, arguments, constants, tiling))

    def _split(self) -> tuple[int, int]:
        """Tokens of a part, and how many parts: the fewest that put two programs on each processor."""
        parts, streams = self.options.parts, self.B * self.H * self.blocks
        if parts is None:
            processors = 1
            if self.q.is_cuda:
                processors = torch.cuda.get_device_properties(self.q.device).multi_processor_count
            enough = 1 if streams >= processors else triton.cdiv(2 * processors, streams)
            parts = min(enough, triton.cdiv(self.N, MIN_PART))
        part = triton.cdiv(triton.cdiv(self.N, parts), MAX_TOKENS) * MAX_TOKENS
        return part, triton.cdiv(self.N, part)

    def _new(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def _gradient(self, x: Tensor, shares: int) -> Tensor:
        """Room for the gradients of x, [shares, B, H, N, width]: laid out as x if there is one share of each head."""
        if shares == 1 and x.shape[1] == self.H:
            return torch.empty_like(x)[None]
        return self._new(shares, self.B, self.H, *x.shape[2:])

    def _total(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The sum over shares and over the heads of a group, [B, G, N, width]."""
        if gradient.shape[:3] == (1, self.B, x.shape[1]):
            return gradient[0]
        return gradient.view(*gradient.shape[:2], x.shape[1], -1, *x.shape[2:]).sum((0, 3)).to(x.dtype)


def _strided(name: str, x: Tensor) -> dict[str, Any]:
    """A tensor [..., B, H, N, width] and its strides, as kernels take them; "e" is of a gradient's shares."""
    strides = zip("ebhn"[-x.ndim + 1 :], x.stride(), strict=False)  # of all dimensions but the last
    return {f"{name}_ptr": x} | {f"{name}_{letter}": stride for letter, stride in strides}


def _named(states: tuple[Tensor, Tensor]) -> dict[str, Any]:
    return dict(zip(("values_ptr", "keys_ptr"), states, strict=True))


class _HedgehogAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        bias_q: Tensor | None,
        bias_k: Tensor | None,
        key_mask: Tensor | None,
        options: Options,
    ) -> Tensor:
        with _on(q):
            problem = Problem(q, k, v, (weight_q, weight_k), (bias_q, bias_k), key_mask, options)
            out, den, states = problem.forward()
        ctx.save_for_backward(q, k, v, weight_q, weight_k, bias_q, bias_k, key_mask, out, den, *states)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, weight_q, weight_k, bias_q, bias_k, key_mask, out, den, *states = ctx.saved_tensors
        with _on(q):
            problem = Problem(q, k, v, (weight_q, weight_k), (bias_q, bias_k), key_mask, ctx.options)
            gradients = problem.backward(out, den, (states[0], states[1]), _rows_contiguous(do))
        *of_inputs, of_weights, of_biases = gradients
        of_parameters = zip((*of_weights, *of_biases), (weight_q, weight_k, bias_q, bias_k), strict=True)
        return *of_inputs, *(None if p is None else d.to(p.dtype) for d, p in of_parameters), None, None


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def supported(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, *, activation: str, negation: bool
) -> str | None:
    """Why the kernels can't serve these tensors, or None if they can. For the arguments see `hedgehog_attention`."""
    if os.environ.get("HHBENCH_TRITON") != "1":
        return "the Triton kernels have not run on a GPU yet; HHBENCH_TRITON=1 turns them on"
    if not q.is_cuda:
        return f"the Triton kernels need CUDA, not {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the Triton kernels need compute capability 8.0"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"the Triton kernels take q, k and v of one type, of 16 or 32 bits, not {q.dtype}, {k.dtype}, {v.dtype}"
    if activation not in ACTIVATIONS:
        return f"the Triton kernels have no activation {activation!r}"
    if q.shape[2] != k.shape[2]:
        return "the Triton kernels need as many queries as keys"
    widths = q.shape[3], weight_q.shape[2], weight_k.shape[2], v.shape[3]
    if any(width not in WIDTHS for width in widths):
        return f"the Triton kernels need widths of {', '.join(map(str, WIDTHS))}, not {widths}"
    half, P = q.dtype == torch.bfloat16, weight_q.shape[2] * (2 if negation else 1)
    if not half and max(P // 2, q.shape[3]) > 64:
        return "the Triton kernels need bfloat16 for widths of more than 64"
    properties: Any = torch.cuda.get_device_properties(q.device)  # torch's stubs lack this one
    available = properties.shared_memory_per_block_optin
    if shared_memory(max(P, 2 * q.shape[3]), half) > available:
        return f"the Triton kernels need more shared memory for these widths than the {available >> 10} KiB of this GPU"
    return None


def hedgehog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
    activation: str = "softmax",
    negation: bool = True,
    parts: int | None = None,
) -> Tensor:
    """The output [B, H, N, E] of `LinearAttention` with the map of `Hedgehog`, differentiable once.

    Call it only where `supported` returns None.

    Args:
        q: [B, H, N, D].
        k: [B, G, N, D], G divides H: each key-value head serves its group of query heads.
        v: [B, G, N, E].
        weight_q: [H, D, F], or [1, D, F] for all heads.
        weight_k: the same for keys, or [G, D, F].
        causal: token i sees tokens up to i only.
        key_mask: bool [B, N], True = attend; None = all.
        bias_q: [H, 1, F], [1, 1, F] or None; both or none.
        bias_k: the same for keys.
        activation: "softmax" or "joint-softmax"; `negation` as in `Hedgehog`.
        parts: into how many parts a sequence is split at most; None: as many as fill the card.
    """
    H = q.shape[1]
    weights = [repeat_heads(w[None], H)[0].contiguous() for w in (weight_q, weight_k)]
    biases = [b if b is None else repeat_heads(b[None], H)[0, :, 0].contiguous() for b in (bias_q, bias_k)]
    options = Options(causal, negation, activation == "joint-softmax", parts)
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    out: Tensor = _HedgehogAttention.apply(q, k, v, *weights, *biases, key_mask, options)
    return out
