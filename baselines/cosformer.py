"""cosFormer: a ReLU map whose weights fall with distance, as a cosine does."""

import math

import torch
from torch import Tensor

from hhbench.attention import FeatureMap, MixerShape, register_attention
from hhbench.errors import UsageError


@register_attention(paper="Qin et al. 2022", cost="N 2D E", recipe="no-transfer")
class CosFormer(FeatureMap):
    """phi_i(x) = [relu(x) sin(pi i / 2M), relu(x) cos(pi i / 2M)] at position i, so that

        phi_i(q).phi_j(k) = relu(q).relu(k) cos(pi (i - j) / 2M)

    M is the longest sequence that the host takes. The original's is the length of the sequence at hand, so that earlier
    outputs change as a causal sequence grows and no state can be carried on; ours is fixed on purpose, and the two are
    equal at full length. A host that takes sequences of any length has an M so large that the cosine is 1 throughout.

    Positions count from 0: the original's count from 1 and reach M, where rounding makes float32's cosine negative. One
    at M or beyond is refused, as weights would turn negative; where reading positions would make the host wait for a
    GPU, such a key is NaN instead, and so is every output that sees it. No parameters, and no scale on q or k.
    """

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.feature_dim = 2 * shape.head_dim

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        return self._placed(q, positions)

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if key_mask is not None:
            positions = positions.masked_fill(~key_mask, 0)
        features = self._placed(k, positions)
        if positions.is_cpu:
            self._check(positions)
            return features, None
        return features.masked_fill((positions >= self.shape.max_len)[:, None, :, None], torch.nan), None

    def _check(self, positions: Tensor) -> None:
        last, longest = int(positions.max()), self.shape.max_len
        if last >= longest:
            raise UsageError(
                f"cosformer is built for {longest} tokens and can't weigh token {last + 1}: its period is fixed"
            )

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None, :, None].to(x.dtype) * (math.pi / (2 * self.shape.max_len))
        x = x.relu()
        return torch.cat([x * angle.sin(), x * angle.cos()], dim=-1)
