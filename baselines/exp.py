"""The elementwise exponential: phi(x) = exp(t x)."""

import math

from torch import Tensor

from hhbench.attention import FeatureMap, MixerShape, register_attention
from hhbench.errors import UsageError


@register_attention(paper="Zhang et al. 2024, section 3.2", cost="N D E", recipe="no-transfer")
class Exponential(FeatureMap):
    """phi(q).phi(k) = sum_d exp(t (q_d + k_d)): spiky at t = 2, yet not a function of q.k.

    No parameters: Hedgehog's exponential map without its matrix and its negated half. The weights are exact, for keys
    carry their largest exponent as a scale of their own. A maximum over keys would see later ones, and dividing each
    key by its own would be another attention.

    Args:
        temperature: t.
    """

    def __init__(self, shape: MixerShape, *, temperature: float = 1.0) -> None:
        super().__init__(shape)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise UsageError(f"temperature must be a number, not {temperature!r}")
        if not 0 < temperature < math.inf:
            raise UsageError(f"temperature must be positive and finite, not {temperature}")
        self.temperature = temperature

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        y = self.temperature * q
        return (y - y.amax(-1, keepdim=True).detach()).exp()

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = self.temperature * k
        top = y.amax(-1).detach()
        return (y - top[..., None]).exp(), top
