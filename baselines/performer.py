"""Performer: FAVOR+, random features whose product is softmax's kernel on average."""

import math

import torch
from torch import Tensor

from hhbench.attention import FeatureMap, MixerShape, register_attention
from hhbench.errors import UsageError


@register_attention(paper="Choromanski et al. 2021, lemma 1 and section 2.4", cost="N m E", recipe="no-transfer")
class Performer(FeatureMap):
    """phi(x) = exp(w_f.x' - |x'|^2 / 2), f = 1..m, with x' = x sqrt(scale), that is x D^(-1/4): E phi(q).phi(k) / m =
    exp(scale q.k). The factor 1/m cancels.

    The m rows w_f come in blocks of D orthogonal ones. Each is as long as a Gaussian vector of its own. Queries and
    keys of all heads share them. Training draws new ones now and then; evaluation keeps the last, and the state dict
    carries them.

    Where we differ from public copies: a query is divided by the largest of its own features and a key by that of its
    own (the sum carries the running maximum of keys), so nothing is added after the exponential, and no key looks at
    a later one. performer-pytorch divides keys by the maximum over all of them, then adds 1e-4: a leak from the
    future, and nearly even weights at D = 64, where 99 % of key features are smaller. It also leaves the signs of the
    QR decomposition to LAPACK, so that the first row of each block always has a negative first coordinate and the
    kernel is biased; here no direction is preferred. zoology forgets the rows' lengths: its kernel is about 1000
    times too small at D = 64, and flatter.

    Args:
        num_features: m; D ln D by default, and at least D.
        redraw_interval: forward passes in training between draws; 0 keeps the first. A pass that is computed again
            for its gradient (checkpointing) counts again.
    """

    tied = True
    projection: Tensor
    seed: Tensor
    num_passes: Tensor

    def __init__(self, shape: MixerShape, *, num_features: int | None = None, redraw_interval: int = 1000) -> None:
        super().__init__(shape)
        D = shape.head_dim
        self.feature_dim = max(D, int(D * math.log(D))) if num_features is None else num_features
        if self.feature_dim < 1:
            raise UsageError(f"num_features must be at least 1, not {num_features}")
        if redraw_interval < 0:
            raise UsageError(f"redraw_interval must be at least 0, not {redraw_interval}")
        self.redraw_interval = redraw_interval
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.int64))
        self._mirror: tuple[Tensor, int, int] | None = None  # the counter, its version and its value
        self.register_buffer("projection", self._draw(0).to(torch.get_default_dtype()))

    def begin_pass(self) -> None:
        """Count the pass, and draw another projection where its interval has passed."""
        if not self.redraw_interval:
            return
        passes = self._passes()
        draws, since = divmod(passes, self.redraw_interval)
        if draws and not since:  # a new tensor: the old one may be saved for a gradient that is still to come
            self.projection = self._draw(draws).to(self.projection)
        self.num_passes += 1
        self._mirror = (self.num_passes, self.num_passes._version, passes + 1)

    def _passes(self) -> int:
        """`num_passes`, read from the tensor only where something else wrote it: on a GPU that waits."""
        counter, mirror = self.num_passes, self._mirror
        known = mirror is not None and mirror[0] is counter and mirror[1] == counter._version
        return mirror[2] if mirror is not None and known else int(counter)

    def flops(self, num_tokens: int) -> int:
        """The projection; the length of a key, one part in m, is not counted."""
        return 2 * self.shape.num_heads * num_tokens * self.shape.head_dim * self.feature_dim

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        logits = self._logits(q)
        return (logits - logits.amax(-1, keepdim=True).detach()).exp()

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self._logits(k)
        top = logits.amax(-1).detach()
        return (logits - top[..., None]).exp(), top - k.square().sum(-1) * (self.shape.scale / 2)

    def _logits(self, x: Tensor) -> Tensor:
        scaled = self.projection.to(x.dtype) * self.shape.scale**0.5  # smaller than x
        return torch.matmul(x, scaled.mT)

    def _draw(self, index: int) -> Tensor:
        """[m, D] in float64, the same on every rank: from the seed and the number of the draw alone."""
        generator = torch.Generator().manual_seed(int(self.seed) + index)
        D, m = self.shape.head_dim, self.feature_dim
        blocks = torch.randn(-(-m // D), D, D, dtype=torch.float64, generator=generator)
        lengths: Tensor = torch.randn(m, D, dtype=torch.float64, generator=generator).norm(dim=-1, keepdim=True)
        rotations, triangular = torch.linalg.qr(blocks)
        rows: Tensor = (rotations * triangular.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).mT
        return rows.reshape(-1, D)[:m] * lengths
