"""The contracts: what an attention is and at which rung it enters, with what their implementations share.

Shapes, here and everywhere: B batch, H query heads, G key-value heads, N tokens, D head width, E value width,
F feature width, C model width. `key_mask` is bool [B, N], True = attend. `positions` is int64 [B, N] and counts
attended tokens.

A new thought registers at the lowest rung that holds it, and hhbench supplies the rungs above:

    FeatureMap        phi, for a linear attention: weights ~ phi(q) . phi(k)
    Attention         what happens between q, k, v and the output
    SequenceMixer     the whole block, projections included
"""

import contextlib
import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hhbench.errors import HHBenchError, UsageError
from hhbench.linear_sum import LinearState, Sums

Direction = Literal["causal", "bidirectional"]
NOTHING = contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Where an attention sits: read from the host's layer, never guessed.

    Attributes:
        dim: C, the width of the model.
        num_heads: H, heads of q.
        num_kv_heads: G, heads of k and v; divides `num_heads`.
        head_dim: D. Not always dim / num_heads (Qwen3).
        scale: what softmax multiplies q.k with, usually D ** -0.5. Linear attentions don't use it: a factor on
            phi(q).phi(k) cancels in the normaliser.
        max_len: the longest sequence the host can take.
        causal: whether token i sees tokens up to i only.
        dropout: of softmax's weights while training. Attentions that never form weights don't apply it.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    max_len: int
    causal: bool
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "num_kv_heads", "head_dim", "max_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"{self.num_heads} query heads can't share {self.num_kv_heads} key-value heads evenly")

    @property
    def direction(self) -> Direction:
        return "causal" if self.causal else "bidirectional"


class FeatureMap(nn.Module):
    """phi: [B, H, N, D] -> [B, H, N, F], the part that tells linear attentions apart.

    The simplest map overrides `forward(x)` alone and serves queries and keys alike. A map that needs positions, or
    whose keys carry a scale, overrides `map_queries` and `map_keys`.

    A linear attention has two maps of a class, one for queries and one for keys. They begin as copies, and stay one if
    it is told to tie them.

    Attributes:
        feature_dim: F.
        signed: features may be negative, though phi(q).phi(k) is not (Taylor). Others are kept at or above a floor.
        tied: queries and keys need the same map, as random features do. It then must not depend on the number of heads.
        floored: it keeps its features at or above FLOOR by itself, and each row has one well above it.
    """

    feature_dim: int
    signed: ClassVar[bool] = False
    tied: ClassVar[bool] = False
    floored: ClassVar[bool] = False

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape
        self.feature_dim = shape.head_dim

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} maps queries and keys by their own methods")

    def begin_pass(self) -> None:
        """Called once before each forward pass in training: a map that draws new features now and then does it here.

        Tokens are mapped in blocks, and mapped again for gradients.
        """

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        """Features of queries, each row up to a positive factor of its own, which cancels in the normaliser."""
        del positions
        features: Tensor = self(q)
        return features

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features of keys and their log scales [B, H, N], or None for scale 1.

        The true feature is features * exp(log_scale): exponential maps keep their rows near 1 this way, and the sum
        carries the running maximum of the scales. A key's features must not depend on another key.
        """
        del positions, key_mask
        return self(k), None

    def map_into(self, x: Tensor, out: Tensor) -> bool:
        """Write the features of queries or keys x [B, H, N, D], at or above FLOOR, into out [B, H, N, F].

        For a map whose features know no positions and no log scales, where that saves time and no gradient is wanted.
        False, and nothing done, where it doesn't: the default.
        """
        del x, out
        return False

    def map_token(
        self, key_map: "FeatureMap", q: Tensor, k: Tensor, *, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `map_queries` makes of q and `key_map.map_keys` of k, for one token that is decoded.

        For a map that can do both in fewer operations: so little is computed that their number is the time.
        """
        return self.map_queries(q, positions=positions), *key_map.map_keys(k, positions=positions, key_mask=None)

    def fused(
        self, key_map: "FeatureMap", q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_mask: Tensor | None
    ) -> Tensor | None:
        """The whole attention [B, H, N, E] by a kernel of the map's own, for q [B, H, N, D] and k, v [B, G, N, .].

        None, the default, where there is none for these tensors; positions must not matter to it.
        """
        del key_map, q, k, v, causal, key_mask
        return None

    def fused_step(
        self, key_map: "FeatureMap", q: Tensor, k: Tensor, v: Tensor, state: LinearState
    ) -> tuple[Tensor, Sums] | None:
        """One token after a state, by a kernel of the map's own: the output [B, H, 1, E] and the sums after the token.

        None, the default, where there is none for these tensors; positions must not matter to it. The state stays as
        it is.
        """
        del key_map, q, k, v, state
        return None

    def flops(self, num_tokens: int) -> int:
        """FLOPs of mapping [1, H, N, D]: see `Attention.flops`. 0 where it works on each element for itself."""
        del num_tokens
        return 0


@dataclass(frozen=True)
class OptimizerSettings:
    """How a parameter wants to be optimised where that differs from the rest of the model.

    A module inside an attention says so by an attribute `optimizer_settings: dict[str, OptimizerSettings]`, by the
    names of its own parameters. An attribute of the module, not of the parameter: copies keep it.

    Attributes:
        max_lr: its learning rate is the run's, but at most this.
        weight_decay: its own weight decay.
    """

    max_lr: float = math.inf
    weight_decay: float = 0.0


class Attention(nn.Module, ABC):
    """What happens between q, k, v and the output of one layer. This is what a user subclasses.

    Attributes:
        shape: where it sits.
        has_weights: False for attentions whose output is not a weighted mean of v (they leave `weights` alone and
            override `quadratic`, are taught by output error only, and reports print "no weights").
        has_state: whether a causal one decodes from a state of constant size: `forward` then also takes
            `state: DecodingState | None = None` and `return_state: bool = False`, and returns (output, state) if asked
            to. q, k, v, key_mask and positions are those of the new tokens only; the state stands for all earlier ones.
        ordered_by_positions: bidirectional, `weights` knows the order of tokens by `positions` alone, so that they may
            come in any order. Attention transfer then takes a few queries of a sequence at a time, in less memory.
    """

    has_weights: ClassVar[bool] = True
    has_state: bool = False
    ordered_by_positions: ClassVar[bool] = False

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The output [B, H, N, E].

        Args:
            q: [B, H, N, D]. Where there are fewer queries than keys, they are the last ones: tokens that are being
                decoded.
            k: [B, G, M, D], M >= N.
            v: [B, G, M, E].
            key_mask: bool [B, M], True = attend; None = all.
            positions: int64 [B, M]; None = count the attended tokens.

        A query with no key to attend to gets zeros.
        """

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The weights [B, H, N, M] with which `forward` averages v. Rows sum to 1, or to 0 with no key to attend to."""
        raise HHBenchError(f"{type(self).__name__} has no attention weights")

    def quadratic(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The definition written out over all pairs of tokens, [B, H, N, E]: the truth that `forward` must equal."""
        weights = self.weights(q, k, key_mask=key_mask, positions=positions)
        v = repeat_heads(zero_padding(v, key_mask), self.shape.num_heads)
        return (weights @ v.to(weights.dtype)).to(q.dtype)

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Bytes that decoding must keep after `num_tokens` tokens, for inputs of 32 bits; None where it can't decode
        from what it kept. With `has_state` they don't depend on the number of tokens.
        """
        del num_tokens, batch_size
        return None

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int | None:
        """FLOPs of one forward pass: those of the cheapest way to compute the definition, whatever form runs.

        Counted are multiplications and additions of sums over tokens, features and channels, over pairs of tokens
        that may meet only; not what is done to each element for itself. None: not stated.

        Args:
            num_queries: new tokens, the last of the keys.
            num_keys: all tokens. With `has_state` the earlier ones cost nothing.
            batch_size: sequences.
        """
        del num_queries, num_keys, batch_size
        return None


class SequenceMixer(nn.Module, ABC):
    """A whole block from hidden states to hidden states: what has no q, k and v of its own kind (H3, Hyena).

    Attributes:
        has_weights: it never has; see `Attention`.
        has_state: as for `Attention`: whether a causal one takes `state` and `return_state`.
    """

    has_weights: ClassVar[bool] = False
    has_state: bool = False

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]. Hidden states of padded tokens are zeroed first and reach nothing.

        Raises:
            UsageError: x or key_mask doesn't fit; see `check_hidden_states`.
        """

    def quadratic(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """The definition written out over all pairs of tokens, [B, N, C]: the truth that `forward` must equal."""
        raise HHBenchError(f"{type(self).__name__} has no quadratic form")

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """See `Attention.state_bytes`."""
        del num_tokens, batch_size
        return None

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int | None:
        """See `Attention.flops`; projections and gates included."""
        del num_queries, num_keys, batch_size
        return None


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x W, [B, H, N, F], of x [B, H, N, D] and W [H, D, F], or [1, D, F] for all heads, in x's type."""
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    B, H, N, _ = x.shape
    if N != 1 or weight.shape[0] != H:
        return x @ weight
    if B == 1:
        return torch.bmm(x.squeeze(0), weight).unsqueeze(0)
    # A token of each sequence: the product above would copy W for each of them.
    return torch.bmm(x.squeeze(2).transpose(0, 1), weight).transpose(0, 1).unsqueeze(2)


def identity_weight(num_heads: int, head_dim: int, width: int) -> Tensor:
    """Weights [H, D, width] that start a learned map at the identity.

    Columns beyond D are random: as copies of zero they would be dead, or equal for ever.
    """
    if width < 1:
        raise UsageError(f"feature_dim must be at least 1, not {width}")
    weight = torch.eye(head_dim, width).repeat(num_heads, 1, 1)
    if width > head_dim:
        weight[..., head_dim:] = torch.randn(num_heads, head_dim, width - head_dim) * head_dim**-0.5
    return weight


def check_inputs(
    shape: MixerShape,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_mask: Tensor | None,
    positions: Tensor | None = None,
) -> None:
    """Refuse tensors that don't fit the shape, with the shapes in the message."""
    of_q, of_k, H, G, D = q.shape, k.shape, shape.num_heads, shape.num_kv_heads, shape.head_dim
    if len(of_q) != 4 or of_q[1] != H or of_q[3] != D:
        raise UsageError(f"q must be [B, {H}, N, {D}], not {list(of_q)}")
    B = of_q[0]
    if len(of_k) != 4 or of_k[0] != B or of_k[1] != G or of_k[3] != D:
        raise UsageError(f"k must be [{B}, {G}, N, {D}], not {list(of_k)}")
    num_keys = of_k[2]
    if of_q[2] > num_keys:
        raise UsageError(f"{of_q[2]} queries for {num_keys} keys: queries are the last of the keys' tokens")
    if v is not None and (v.ndim != 4 or v.shape[:3] != of_k[:3]):
        raise UsageError(f"v must be {list(of_k[:3])} and any width, not {list(v.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (B, num_keys)):
        raise UsageError(
            f"key_mask must be bool [{B}, {num_keys}], True = attend, not {key_mask.dtype} {list(key_mask.shape)}"
        )
    if positions is not None and positions.shape != (B, num_keys):
        raise UsageError(f"positions must be [{B}, {num_keys}], not {list(positions.shape)}")


def check_hidden_states(shape: MixerShape, x: Tensor, key_mask: Tensor | None) -> None:
    """Refuse hidden states and a mask that don't fit the shape of a sequence mixer."""
    if x.ndim != 3 or x.shape[2] != shape.dim:
        raise UsageError(f"x must be [B, N, {shape.dim}], not {list(x.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]):
        raise UsageError(
            f"key_mask must be bool {list(x.shape[:2])}, True = attend, not {key_mask.dtype} {list(key_mask.shape)}"
        )


def token_positions(key_mask: Tensor | None, *, batch_size: int, length: int, device: torch.device) -> Tensor:
    """Positions [B, N] that count attended tokens, so that padding on either side changes nothing."""
    if key_mask is None:
        return torch.arange(length, device=device).expand(batch_size, length)
    return (key_mask.long().cumsum(-1) - 1).clamp_min(0)


def visible_keys(
    key_mask: Tensor | None, *, causal: bool, num_queries: int, num_keys: int, device: torch.device
) -> Tensor | None:
    """Which keys each query may see, as bool broadcastable to [B, H, N, M]; None when all may."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if causal and num_queries > 1:
        past = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
        visible = past[None, None] if visible is None else visible & past
    return visible


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over x run in, under autocast too: float32 for inputs of 32 bits or fewer, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Sums and features keep their type within it."""
    if not torch.is_autocast_enabled(device.type):
        return NOTHING
    return torch.autocast(device.type, enabled=False)


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the keys that `visible_keys` lets a query see; zeros where it may see none."""
    if visible is None:
        return scores.softmax(-1)
    # A query with no key would be 0/0: let it see all of them, then zero its weights.
    blind = ~visible.any(-1, keepdim=True)
    return scores.masked_fill(~(visible | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)


def refuse_state_unless_causal(shape: MixerShape, what: str = "attention") -> None:
    """Refuse a state to what isn't causal: the check before `state` or `return_state` is honoured."""
    if not shape.causal:
        raise UsageError(f"a bidirectional {what} has no state: later tokens change earlier outputs")


def zero_padding(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """x [B, H, N, D], the last N of the mask's tokens, with zeros at padded ones.

    Whatever lies there must reach no sum and no gradient, and 0 * inf is NaN.
    """
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, -x.shape[2] :, None], 0.0)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, G, N, D] -> [B, H, N, D]: each key-value head serves its group of query heads."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
