"""Linear attention: one sum in three forms.

    output_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)        j <= i if causal, attended keys only

(Katharopoulos et al. 2020.) The quadratic form writes the weights out and is the truth. The chunked form carries the
two sums from chunk to chunk, in O(N) time and memory. The recurrent form takes one token at a time. All three agree to
rounding, outputs and gradients.

The keys of exponential maps come with a log scale. The sums carry the running maximum of the log scales of the keys
seen so far and are rescaled as it grows: it never looks at a later or a padded key, and it cancels in the quotient.

Everything here takes mapped queries and keys of any leading dimensions; `hhbench.linear_attention` maps them, masks
them and picks the form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hhbench.state import DecodingState

FLOOR = 1e-12  # features lie at or above it, in all forms alike
CHUNK = 128
FORMS = ("auto", "quadratic", "chunked", "recurrent")


@dataclass(frozen=True)
class LinearState(DecodingState):
    """What a causal linear attention remembers of any number of tokens. G is H unless a state serves a group of heads.

    Attributes:
        values: sum of phi(k) v^T, [B, G, F, E].
        keys: sum of phi(k), [B, G, F].
        log_max: the running maximum of the keys' log scales, [B, G]; both sums are divided by its exponential.
        num_attended: attended tokens so far, int64 [B]; the next one's position.
    """

    values: Tensor
    keys: Tensor
    log_max: Tensor
    num_attended: Tensor


@dataclass(frozen=True)
class Keys:
    """Mapped keys with padded ones already zero. Features [..., N, F], values [..., N, E], log_scale [..., N]."""

    features: Tensor
    values: Tensor
    log_scale: Tensor | None

    def __getitem__(self, tokens: slice) -> "Keys":
        scale = None if self.log_scale is None else self.log_scale[..., tokens]
        return Keys(self.features[..., tokens, :], self.values[..., tokens, :], scale)


@dataclass(frozen=True)
class Sums:
    """The two running sums, divided by exp(log_max)."""

    values: Tensor  # [..., F, E]
    keys: Tensor  # [..., F]
    log_max: Tensor  # [...]

    def add(self, keys: Keys) -> "Sums":
        """The sums after these keys."""
        before, features = self, keys.features
        if keys.log_scale is not None:
            log_max = torch.maximum(self.log_max, keys.log_scale.amax(-1)).detach()
            top = finite(log_max)
            kept = (self.log_max - top).exp()[..., None]
            before = Sums(self.values * kept[..., None], self.keys * kept, log_max)
            features = features * (keys.log_scale - top[..., None]).exp()[..., None]
        if features.shape[-2] == 1:  # a token that is decoded: one pass over the sums, no product of matrices
            values = torch.addcmul(before.values, features.mT, keys.values)
            return Sums(values, before.keys + features.squeeze(-2), before.log_max)
        return Sums(before.values + features.mT @ keys.values, before.keys + features.sum(-2), before.log_max)


def finite(log_max: Tensor) -> Tensor:
    """0 where no key was seen yet, so that exp(-inf - log_max) is 0 and not NaN."""
    return log_max.masked_fill(log_max == -torch.inf, 0.0)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; zero, with zero gradients, where a query has no key to attend to."""
    return numerator / denominator.masked_fill(denominator == 0, 1.0)[..., None]


def _running_max(keys: Keys, start: Tensor) -> Tensor:
    assert keys.log_scale is not None
    return torch.maximum(start[..., None], keys.log_scale.cummax(-1).values).detach()


def _relative_scale(log_scale: Tensor, top: Tensor) -> Tensor:
    """exp(log_scale_j - top_i), [..., N, M].

    Keys that a causal query must not see may lie above its maximum: theirs is kept finite, at 1. Not by a clamp, whose
    gradient at its bound, where the largest key lies, is 0 in some versions of torch and 1 in others.
    """
    relative = log_scale[..., None, :] - top[..., None]
    return relative.masked_fill(relative > 0, 0.0).exp()


def quadratic_scores(queries: Tensor, keys: Keys, *, causal: bool) -> Tensor:
    """phi(q_i).phi(k_j) for every pair that may meet, [..., N, M], each row up to a factor; the other pairs are 0."""
    num_queries, num_keys = queries.shape[-2], keys.features.shape[-2]
    scores = queries @ keys.features.mT
    if keys.log_scale is not None:
        if causal:
            top = keys.log_scale.cummax(-1).values[..., num_keys - num_queries :].detach()
        else:
            top = keys.log_scale.amax(-1, keepdim=True).detach().expand(*keys.log_scale.shape[:-1], num_queries)
        scores = scores * _relative_scale(keys.log_scale, finite(top))
    return scores.tril(num_keys - num_queries) if causal else scores


def quadratic(queries: Tensor, keys: Keys, *, causal: bool) -> Tensor:
    """The sum with its weights written out: O(N M) memory, and the truth for the other forms."""
    scores = quadratic_scores(queries, keys, causal=causal)
    return divide(scores @ keys.values, scores.sum(-1))


def chunked(queries: Tensor, keys: Keys, sums: Sums | None, *, chunk_size: int = CHUNK) -> Tensor:
    """The causal sum, quadratic within a chunk and by running sums across chunks: O(N) time and memory.

    In plain operations, which autograd and torch.compile follow: for compiled models, and maps that draw random
    numbers; others have `hhbench.blockwise`. Where keys have log scales, one chunk after the other: their running
    maximum is not known before.
    """
    if keys.log_scale is not None:
        return _chunk_by_chunk(queries, keys, sums, chunk_size)
    length = queries.shape[-2]
    surplus = -length % chunk_size

    def cut(x: Tensor) -> Tensor:
        """[..., N, X] -> [..., chunks, chunk_size, X], filled up with zeros."""
        x = pad(x, (0, 0, 0, surplus))
        return x.view(*x.shape[:-2], -1, chunk_size, x.shape[-1])

    q, features, values = cut(queries), cut(keys.features), cut(pad(keys.values, (0, 1), value=1.0))
    start = empty_sums(keys) if sums is None else sums
    first = torch.cat([start.values, start.keys[..., None]], dim=-1).unsqueeze(-3)
    before = torch.cat([first, features[..., :-1, :, :].mT @ values[..., :-1, :, :]], dim=-3).cumsum(-3)
    both = (q @ features.mT).tril() @ values + q @ before
    both = both.flatten(-3, -2)[..., :length, :]
    return divide(both[..., :-1], both[..., -1])


def _chunk_by_chunk(queries: Tensor, keys: Keys, sums: Sums | None, chunk_size: int) -> Tensor:
    """`chunked` for keys with log scales."""
    outputs = []
    num_tokens = queries.shape[-2]
    for start in range(0, num_tokens, chunk_size):
        tokens = slice(start, start + chunk_size)
        q, chunk = queries[..., tokens, :], keys[tokens]
        assert chunk.log_scale is not None
        sums = empty_sums(chunk) if sums is None else sums
        top = finite(_running_max(chunk, sums.log_max))
        scores = ((q @ chunk.features.mT) * _relative_scale(chunk.log_scale, top)).tril()
        q = q * (sums.log_max[..., None] - top).exp()[..., None]
        numerator = scores @ chunk.values + q @ sums.values
        denominator = scores.sum(-1) + (q @ sums.keys[..., None]).squeeze(-1)
        outputs.append(divide(numerator, denominator))
        if start + chunk_size < num_tokens:
            sums = sums.add(chunk)
    return torch.cat(outputs, dim=-2)


def recurrent(queries: Tensor, keys: Keys, sums: Sums | None) -> tuple[Tensor, Sums]:
    """The causal sum one token at a time, as decoding does it, and the sums after the last token."""
    sums = sums or empty_sums(keys)
    outputs = []
    for i in range(queries.shape[-2]):
        token = slice(i, i + 1)
        sums = sums.add(keys[token])
        q = queries[..., token, :]
        outputs.append(divide(q @ sums.values, (q @ sums.keys[..., None]).squeeze(-1)))
    return torch.cat(outputs, dim=-2), sums


def step(queries: Tensor, token: Keys, sums: Sums, *, may_be_blind: bool) -> tuple[Tensor, Sums]:
    """One token after others, in as few operations as it takes: `recurrent` without leading dimensions of any number.

    Args:
        queries: [B, H, 1, F].
        token: its key, [B, G, 1, .]; H / G queries each see one.
        sums: [B, G, ...].
        may_be_blind: whether a query may have no key to attend to.
    """
    sums = sums.add(token)
    B, G, F, E = sums.values.shape
    rows = queries.reshape(B * G, -1, F)
    numerator = torch.bmm(rows, sums.values.reshape(B * G, F, E))
    denominator = torch.bmm(rows, sums.keys.reshape(B * G, F, 1))
    out = divide(numerator, denominator.squeeze(-1)) if may_be_blind else numerator / denominator
    return out.view(B, -1, 1, E), sums


def bidirectional(queries: Tensor, keys: Keys) -> Tensor:
    """The sum over all attended keys, by two matrix products: O(N F E)."""
    sums = empty_sums(keys).add(keys)
    return divide(queries @ sums.values, (queries @ sums.keys[..., None]).squeeze(-1))


def empty_sums(keys: Keys) -> Sums:
    lead, F, E = keys.features.shape[:-2], keys.features.shape[-1], keys.values.shape[-1]
    return Sums(
        keys.features.new_zeros(*lead, F, E),
        keys.features.new_zeros(*lead, F),
        keys.features.new_full(lead, -torch.inf if keys.log_scale is not None else 0.0),
    )
