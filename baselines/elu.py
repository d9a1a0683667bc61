"""Linear Transformer: phi(x) = elu(x) + 1."""

from torch import Tensor
from torch.nn.functional import elu

from hhbench.attention import FeatureMap, register_attention


@register_attention(paper="Katharopoulos et al. 2020, eq. 7", cost="N D E", recipe="no-transfer")
class LinearTransformer(FeatureMap):
    """No parameters, and no scale on q or k, as in the original implementation."""

    def forward(self, x: Tensor) -> Tensor:
        return elu(x) + 1
