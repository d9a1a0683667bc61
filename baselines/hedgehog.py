"""Hedgehog: a learned map that mimics softmax."""

from typing import Literal

import torch
from torch import Tensor, nn

from hhbench.attention import FeatureMap, MixerShape, identity_weight, register_attention
from hhbench.errors import UsageError


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

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and their log scales where they are exponentials."""
        y = x @ self.weight.to(x.dtype)
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        halves = [y, -y] if self.negation else [y]
        if self.activation == "softmax":
            return torch.cat([half.softmax(-1) for half in halves], dim=-1), None
        y = torch.cat(halves, dim=-1)
        if self.activation == "joint-softmax":
            return (2 * y).softmax(-1), None
        top = y.amax(-1).detach()
        return (y - top[..., None]).exp(), top
