"""Decoding with a constant state under transformers' own `generate`.

Where transformers keeps the keys and values of every token, a `StateCache` keeps, for each attention that decodes from
a state, that state alone. What has none (softmax, AFT of variant full) has transformers' ordinary layer beside it.

An attention module of transformers calls `cache.update` and then, with what comes back, our interface. A `StateLayer`
gives the new tokens back as they came and hands itself to the layer's slot, which runs the attention on those tokens
and leaves the state after them in it.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hhbench.attention import Attention, SequenceMixer
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts.probe import learned_positions
from hhbench.hosts.slots import SLOT, AttentionSlot, MixerSlot
from hhbench.state import DecodingState

REWINDING = {  # what asks `generate` for a mode that takes tokens back, or looks at several futures of one cache
    "assistant_model": "assisted generation",
    "assistant_early_exit": "assisted generation",
    "use_mtp": "assisted generation",
    "prompt_lookup_num_tokens": "prompt lookup",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
}


class StateLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's share of a cache: the state of its attention, and how many tokens it has seen.

    Attributes:
        state: what the attention remembers; None before the first token.
        num_tokens: tokens so far, padded ones included.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, slot: AttentionSlot | MixerSlot) -> None:
        super().__init__()
        self.slot = slot
        self.state: DecodingState | None = None
        self.num_tokens = 0
        self._awaits_run = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateLayer":
        """A prompt's cache is copied to be continued in several ways: the model isn't, and states are never changed."""
        return copy.copy(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are; the slot is told that its next call continues this layer."""
        if self._awaits_run:
            raise HHBenchError("the step before this one failed half-way: begin with a new cache")
        assert isinstance(self.slot, AttentionSlot)  # a mixer has no keys, and asks for its layer itself
        self.slot.continue_from(self, keys)
        self._awaits_run = self.is_initialized = True
        return keys, values

    def run(self, module: Attention | SequenceMixer, *inputs: Tensor, key_mask: Tensor | None) -> Tensor:
        """The module's output for new tokens after all earlier ones, whose place its state takes.

        Args:
            inputs: q, k and v [B, H, N, D], or hidden states [B, N, C].
            key_mask: bool [B, past + N].
        """
        N = inputs[0].shape[-2]
        key_mask = None if key_mask is None else key_mask[:, -N:]
        out: Tensor
        out, self.state = module(*inputs, key_mask=key_mask, state=self.state, return_state=True)
        self.num_tokens += N
        self._awaits_run = False
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the attention makes its own first state."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.num_tokens = None, 0
        self._awaits_run = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a sum has taken in can't be taken out of it.

        Raises:
            UsageError: always.
        """
        raise UsageError("a state can't be rewound: it sums up the tokens that it has seen. Begin with a new cache.")

    def offload(self) -> None:
        """Nothing: a state is small and needed at every step."""

    def prefetch(self) -> None:
        """See `offload`."""


class StateCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The cache of a converted decoder: a `StateLayer` for each attention or mixer that has a state.

    The others have transformers' ordinary layer, which keeps every key and value.

    Args:
        model: a converted model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers: dict[int, CacheLayerMixin] = {}
        for index, slot in _slots(model).items():
            layers[index] = StateLayer(slot) if _has_state(slot) else DynamicLayer()
        count = max(int(model.config.get_text_config(decoder=True).num_hidden_layers), *(i + 1 for i in layers), 0)
        super().__init__(layers=[layers.get(index) or DynamicLayer() for index in range(count)])

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return sum(map(held_bytes, self.layers))

    @property
    def states(self) -> list[StateLayer]:
        """The layers that hold a state, in order of depth."""
        return [layer for layer in self.layers if isinstance(layer, StateLayer)]

    def reset(self) -> None:
        """Forget every token."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StateLayer):
                layer.reset()
            else:  # before 5.18, transformers zeroes the keys of such a layer and counts them still
                self.layers[index] = DynamicLayer()


class ConstantState:
    """Comes before a decoder's class of transformers: `generate` then decodes from states, with no argument.

    Modes that rewind a cache are refused, and so are caches of other kinds. A model that learned its positions is told
    before it starts where they end.
    """

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`.

        Raises:
            UsageError: the mode rewinds its cache, the cache is of a kind that no state fits, or there are fewer
                positions than tokens.
        """
        if any(_has_state(slot) for slot in _slots(self).values()):
            given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
            self._refuse_rewinding(given or self.generation_config, kwargs)  # type: ignore[attr-defined]
            mixers = [slot for slot in _slots(self).values() if isinstance(slot, MixerSlot)]
            if mixers and given is None and all(map(_has_state, mixers)):
                kwargs.setdefault("use_cache", True)  # off in the config, for no other cache serves a mixer
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _refuse_rewinding(self, config: Any, kwargs: Mapping[str, Any]) -> None:
        name = type(self).__name__
        for setting, mode in REWINDING.items():
            if kwargs.get(setting, getattr(config, setting, None)):
                raise UsageError(f"{name} decodes from a constant state, which {mode} ({setting}) would rewind")
        cache = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
        if cache not in (None, "dynamic"):
            raise UsageError(f"{name} decodes from a constant state; leave cache_implementation={cache!r} out")

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers makes its default cache, under the name that its version has for it; ours takes its place."""
        limit = learned_positions(self)
        if limit is not None and generation_config.max_length - 1 > limit:  # the last new token is never read
            raise UsageError(
                f"{type(self).__name__} learned {limit} positions, and prompt and new tokens are "
                f"{generation_config.max_length}: ask for fewer new tokens"
            )
        before = dict(model_kwargs)
        made = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        for key, value in model_kwargs.items():
            if not isinstance(value, Cache) or value is before.get(key):
                continue
            cache = StateCache(self)
            if cache.states and isinstance(value, EncoderDecoderCache):
                value.self_attention_cache = cache
            elif cache.states and isinstance(value, DynamicCache):
                model_kwargs[key] = cache
        return made


def _slots(model: Any) -> dict[int, AttentionSlot | MixerSlot]:
    """What a decoder's layers were given, by the index under which they find their share of a cache."""
    found: dict[int, AttentionSlot | MixerSlot] = {}
    for module in model.modules():
        slot = module if isinstance(module, MixerSlot) else getattr(module, SLOT, None)
        index = getattr(module, "layer_idx", None)
        if isinstance(slot, AttentionSlot | MixerSlot) and slot.placement.shape.causal and index is not None:
            found[index] = slot
    return found


def _has_state(slot: AttentionSlot | MixerSlot) -> bool:
    return slot.mixer.has_state if isinstance(slot, MixerSlot) else slot.attention.has_state


def held_bytes(layer: CacheLayerMixin) -> int:
    """Bytes that a layer of a cache holds: its state, or keys and values."""
    if isinstance(layer, StateLayer):
        return layer.nbytes
    tensors = [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
