"""ReLU: phi(x) = relu(x)."""

from torch import Tensor

from hhbench.attention import FeatureMap, register_attention


@register_attention(paper="Qin et al. 2022 (cosFormer), without its reweighting", cost="N D E", recipe="no-transfer")
class ReLU(FeatureMap):
    """No parameters, and no scale on q or k: T2R's map with W at the identity that is never trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()
