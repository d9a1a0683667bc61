"""Hedgehog: a learned map that mimics softmax."""

import math
import os
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hhbench import native
from hhbench.attention import FeatureMap, MixerShape, identity_weight, project, register_attention
from hhbench.errors import UsageError
from hhbench.kernels import ran
from hhbench.linear_sum import FLOOR, LinearState, Sums
from hhbench.native.step import hedgehog_step

MANY = 2**14  # elements from which it pays to look at them first
SAFE = 80.0  # no exponential of less, and no sum of them, overflows


def _two_softmaxes(y: Tensor, out: Tensor | None = None) -> tuple[Tensor, bool]:
    """softmax(y) and softmax(-y) of y [..., F], at or above FLOOR, [..., 2, F]; and whether any may have been below.

    On a CPU half the exponentials do: exp(-y) is 1 / exp(y), where neither overflows. A few tokens take one softmax.
    """
    if out is None and y.numel() < MANY:
        return torch.cat([y, -y], dim=-1).view(*y.shape[:-1], 2, y.shape[-1]).softmax(-1).clamp_min_(FLOOR), True
    out = y.new_empty(*y.shape[:-1], 2, y.shape[-1]) if out is None else out
    halves = y.device.type == "cpu" and y.numel() >= MANY
    largest = max(map(abs, map(float, torch.aminmax(y)))) if halves else math.inf
    if largest < SAFE:
        up = y.exp()
        for half, e in zip(out.unbind(-2), (up, up.reciprocal()), strict=True):
            torch.mul(e, e.sum(-1, keepdim=True).reciprocal_(), out=half)
        if math.exp(-2 * largest) / y.shape[-1] >= FLOOR:
            return out, False
    else:
        torch.softmax(torch.stack([y, -y], dim=-2), -1, out=out)
    out.clamp_min_(FLOOR)
    return out, True


class _TwoSoftmaxes(torch.autograd.Function):
    """y [..., F] -> [softmax(y), softmax(-y)], [..., 2 F], at or above FLOOR."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        out, ctx.floored = _two_softmaxes(y)
        ctx.save_for_backward(out)
        return out.flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, received: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        received = received.view_as(out)
        if ctx.floored:
            received = received.masked_fill(out <= FLOOR, 0.0)
        of_halves: Tensor = torch.ops.aten._softmax_backward_data(received, out, -1, out.dtype)
        return of_halves[..., 0, :] - of_halves[..., 1, :]


@register_attention(paper="Zhang et al. 2024, section 4.2 and appendix A.1", cost="N 2F E")
class Hedgehog(FeatureMap):
    """y = x W_h (+ b_h); phi(x) = [act(y), act(-y)], with W at the identity to begin with.

    Public code gives the name to three maps, which are three functions, not one and its stabilised copies:

    - `activation="softmax"`: each half is a softmax over its features, as in LoLCATs. This bounds the features, and
      divides each key by a norm of its own.
    - `activation="exp"`: the elementwise exponential of the paper's section 4.2. Its weights are exact: keys carry
      their largest exponent as a scale. LoLCATs' divides each half of each key by its own largest.
    - `activation="joint-softmax"`: one softmax over [2y, -2y], the HedgehogFeatureMap of flash-linear-attention (whose
      W is shared by heads and has a bias).

    Args:
        activation: "softmax", "exp" or "joint-softmax".
        feature_dim: F, the width of each half; the head width by default, so that phi is twice as wide.
        bias: add b_h. The paper's parameter count of its Llama run (0.495 % of the model) has none.
        shared_heads: one W for all heads, as in the listing of the paper's appendix.
        negation: False leaves the half of -y out: phi(x) = act(y), or softmax(2y) where it is joint.
        init: "identity", or "random": uniform within sqrt(6 / (D F)), as LoLCATs' released configurations start. That
            is what torch's kaiming_uniform_ makes of a tensor [H, D, F], whose fan it takes to be D F, not D: y spreads
            sqrt(2 / F) as wide as x, and phi is nearly constant. LoLCATs copies the queries' map to the keys before
            training, so that its kernel begins ordered by q.k; ours are two draws, one with `tie_qk`.
    """

    floored = True

    def __init__(
        self,
        shape: MixerShape,
        *,
        activation: Literal["softmax", "exp", "joint-softmax"] = "softmax",
        feature_dim: int | None = None,
        bias: bool = False,
        shared_heads: bool = False,
        negation: bool = True,
        init: Literal["identity", "random"] = "identity",
    ) -> None:
        super().__init__(shape)
        if activation not in ("softmax", "exp", "joint-softmax"):
            raise UsageError(f"hedgehog's activation is softmax, exp or joint-softmax, not {activation!r}")
        if init not in ("identity", "random"):
            raise UsageError(f"hedgehog's init is identity or random, not {init!r}")
        self.activation, self.negation = activation, negation
        half = shape.head_dim if feature_dim is None else feature_dim
        self.feature_dim = 2 * half if negation else half
        heads = 1 if shared_heads else shape.num_heads
        weight = identity_weight(heads, shape.head_dim, half)
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(weight) if init == "random" else weight)
        self.bias = nn.Parameter(torch.zeros(heads, 1, half)) if bias else None

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        return self._features(q)[0]

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._features(k)

    def map_into(self, x: Tensor, out: Tensor) -> bool:
        if self.activation != "softmax" or not self.negation:
            return False
        _two_softmaxes(self._projected(x), out.view(*out.shape[:-1], 2, -1))
        return True

    def fused(
        self, key_map: FeatureMap, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None
    ) -> Tensor | None:
        assert isinstance(key_map, Hedgehog)
        if q.device.type == "cpu" and native.wanted():
            if not causal or self.activation != "softmax" or not self.negation:
                return None
            maps = self.weight, key_map.weight, self.bias, key_map.bias
            return native.hedgehog(q, k, v, *maps, key_mask=key_mask)
        if not q.is_cuda or os.environ.get("HHBENCH_TRITON") != "1":
            return None
        try:
            from hhbench.baselines import _hedgehog_triton as triton
        except ImportError:  # no Triton for this platform
            return None
        weights = self.weight, key_map.weight
        if triton.supported(q, k, v, *weights, activation=self.activation, negation=self.negation):
            return None
        ran("Triton")
        out: Tensor = triton.hedgehog_attention(
            q,
            k,
            v,
            *weights,
            causal=causal,
            key_mask=key_mask,
            bias_q=self.bias,
            bias_k=key_map.bias,
            activation=self.activation,
            negation=self.negation,
        )
        return out

    def map_token(
        self, key_map: FeatureMap, q: Tensor, k: Tensor, *, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert isinstance(key_map, Hedgehog)
        heads = [q.shape[1], k.shape[1]]
        both, scale = self._activated(torch.cat([self._projected(q), key_map._projected(k)], dim=1))
        queries, keys = both.split_with_sizes(heads, dim=1)
        return queries, keys, None if scale is None else scale[:, heads[0] :]

    def fused_step(
        self, key_map: FeatureMap, q: Tensor, k: Tensor, v: Tensor, state: LinearState
    ) -> tuple[Tensor, Sums] | None:
        assert isinstance(key_map, Hedgehog)
        if not q.is_cpu or not native.wanted() or self.activation != "softmax" or not self.negation:
            return None
        return hedgehog_step(q, k, v, self.weight, key_map.weight, self.bias, key_map.bias, state=state)

    def _projected(self, x: Tensor) -> Tensor:
        y, bias = project(x, self.weight), self.bias
        return y if bias is None else y + bias.to(x.dtype)

    def flops(self, num_tokens: int) -> int:
        """The product with W."""
        return 2 * self.shape.num_heads * num_tokens * self.shape.head_dim * self.weight.shape[-1]

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and their log scales where they are exponentials."""
        return self._activated(self._projected(x))

    def _activated(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of projected queries or keys, each row for itself."""
        if self.activation == "softmax":
            if self.negation and torch.is_grad_enabled():
                return _TwoSoftmaxes.apply(y), None
            if self.negation:
                return _two_softmaxes(y)[0].flatten(-2), None
            return y.softmax(-1).clamp_min(FLOOR), None
        y = torch.cat([y, -y], dim=-1) if self.negation else y
        if self.activation == "joint-softmax":
            return (2 * y).softmax(-1).clamp_min(FLOOR), None
        top = y.amax(-1).detach()
        return (y - top[..., None]).exp().clamp_min(FLOOR), top
