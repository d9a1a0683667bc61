"""Which layers of a transformers model can be replaced: a dry run on a few tokens shows who calls the interface."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hhbench.attention import MixerShape
from hhbench.errors import UsageError
from hhbench.hosts.interface import MaskFunction, patterns, refuse_unknown
from hhbench.hosts.slots import HostLayer

PROBE = "hhbench-probe"
UNBOUNDED = 2**31
# What a config may call a layer that attends to all tokens, or to those in a window. The others of a hybrid model
# (linear attention, convolutions, state spaces, sparse attention) are no softmax that could be replaced.
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def transformers_layers(model: PreTrainedModel) -> list[HostLayer]:
    """The attention layers of a transformers model in order of depth, cross-attentions among them.

    Raises:
        UsageError: it has none, or one of them does what no attention here can do.
    """
    name = type(model).__name__
    try:
        _refuse_by_config(model)
        calls = _Calls(model)
        with calls.watched(training=[]):  # layers that a model drops while training show
            model(**_few_tokens(model))
        layers = calls.layers
        calls.layers = []
        with calls.watched(training=[layer.module for layer in layers]):  # and here the dropout
            model(**_few_tokens(model))
    except UsageError as error:
        raise UsageError(f"{name} can't be a host: {error}") from error
    except Exception as error:
        raise UsageError(
            f"{name} can't be a host: it doesn't run under transformers' attention interface "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error
    if not layers:
        biased = ", with a bias on its scores" if _says_bias(model) else ""
        raise UsageError(
            f"{name} can't be a host: it computes its attention itself, past transformers' interface{biased}"
        )
    if len({layer.name for layer in layers}) < len(layers):
        raise UsageError(f"{name} can't be a host: it runs one attention layer several times")
    return [
        replace(layer, shape=replace(layer.shape, dropout=training.shape.dropout))
        for layer, training in zip(layers, calls.layers, strict=True)
    ]


def ranges(indices: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _refuse_by_config(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = sorted(set(kinds) - ATTENTION_LAYERS)
    if others:
        where = " and ".join(f"{other} ({ranges([i for i, k in enumerate(kinds) if k == other])})" for other in others)
        raise UsageError(f"it is a hybrid with layers of {where}, which are no softmax attention to replace")
    if getattr(config, "kv_lora_rank", None):
        raise UsageError(
            f"it has latent attention (kv_lora_rank={config.kv_lora_rank}), whose keys and values are made of a latent"
        )


def _says_bias(model: PreTrainedModel) -> bool:
    """Whether a model that doesn't show its attention says that it has ALiBi or a bias by distance."""
    config = model.config
    return bool(
        getattr(config, "alibi", False)
        or getattr(config, "relative_attention_num_buckets", None)
        or any("alibi" in name for name in dir(model.base_model))
    )


class _Calls:
    """The layers that call the interface while the model runs under the probe."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.layers: list[HostLayer] = []
        self.masks: list[tuple[Tensor, list[tuple[bool, int | None]]]] = []  # what was given, and its `patterns`

    @contextmanager
    def watched(self, *, training: list[nn.Module]) -> Iterator[None]:
        """The model runs under the probe, in evaluation mode but for some modules, and is left as it was."""
        AttentionInterface.register(PROBE, self._attend)
        AttentionMaskInterface.register(PROBE, self._mask)
        before = self.model.config._attn_implementation
        modes = {module: module.training for module in self.model.modules()}
        device = next(self.model.parameters()).device
        try:
            self.model.set_attn_implementation(PROBE)
            self.model.eval()
            for module in training:
                module.train()
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                yield
        finally:
            self.model.set_attn_implementation(before)
            for module, mode in modes.items():
                module.training = mode

    def _mask(
        self,
        *args: Any,
        mask_function: MaskFunction,
        batch_size: int,
        kv_length: int,
        q_length: int,
        local_size: int | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> Tensor:
        """A mask of its own for each request, by which a layer shows which request it came from."""
        del args, kwargs
        mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        if mask_function in (causal_mask_function, bidirectional_mask_function):
            self.masks.append((mask, [(mask_function is causal_mask_function, None)]))
            return mask
        queries = torch.arange(q_length, device=device)
        if local_size is not None:  # beyond the tokens at hand too, where a window shows its edge and a chunk its end
            queries = torch.cat([queries, local_size + torch.arange(-1, 3, device=device)]).clamp_min(0)
        num_tokens = kv_length if local_size is None else None
        found = patterns(mask_function, queries, local_size, batch_size=batch_size, num_tokens=num_tokens)
        if not found:
            what = "a mask of its own" if local_size is None else f"chunks or blocks of {local_size} tokens"
            raise UsageError(f"it attends within {what}, which no attention of hhbench does")
        self.masks.append((mask, found))
        return mask

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **other: Any,
    ) -> tuple[Tensor, None]:
        name, D = type(module).__name__, query.shape[3]
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UsageError(f"{name} adds a bias to the scores, or a mask of its own, {list(attention_mask.shape)}")
        refuse_unknown(module, attention_mask, other)
        if not key.shape[3] == value.shape[3] == D:
            raise UsageError(
                f"{name} has latent attention, or the like: keys of width {key.shape[3]} and values of {value.shape[3]}"
            )
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        cross = query.shape[2] != key.shape[2]
        if cross and causal:
            raise UsageError(f"{name} has {key.shape[2]} keys for {query.shape[2]} tokens")
        says = causal, sliding_window
        masked = next((found for mask, found in self.masks if mask is attention_mask), [says])
        if says not in masked:
            raise UsageError(f"{name} says that it is {_pattern(*says)}, and its mask is {_pattern(*masked[0])}")
        self.layers.append(
            HostLayer(
                self.names[module],
                module,
                MixerShape(
                    dim=int(self.model.config.get_text_config().hidden_size),
                    num_heads=query.shape[1],
                    num_kv_heads=key.shape[1],
                    head_dim=D,
                    scale=D**-0.5 if scaling is None else float(scaling),
                    max_len=_max_len(self.model, causal, key.shape[2]),
                    causal=causal,
                    dropout=float(dropout),
                ),
                window=sliding_window,
                cross=cross,
            )
        )
        return value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None


def _pattern(causal: bool, window: int | None) -> str:
    return ("causal" if causal else "bidirectional") + ("" if window is None else f" with a window of {window} tokens")


def _max_len(model: PreTrainedModel, causal: bool, num_keys: int) -> int:
    """How many tokens a layer can have: those that it has where the input is of a fixed size."""
    if model.main_input_name != "input_ids" and not causal:
        return num_keys
    config = model.config.get_text_config()
    given = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    return int(given or UNBOUNDED)


def learned_positions(model: Any) -> int | None:
    """How many tokens a model that learned its positions has positions for; None for one that learned none (rotary
    embeddings).
    """
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search("position|wpe", name.rpartition(".")[2])
    ]
    # RoBERTa counts positions from behind its padding token; OPT has two rows that its config doesn't count.
    limits = [table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    if limits and isinstance(model, PreTrainedModel):
        said = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limits += [int(said)] if said else []
    return min(limits, default=None)


def _few_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """The least input: in an encoder-decoder of another length for the decoder, so that cross-attention shows."""
    weight, config = next(model.parameters()), model.config
    inputs = {}
    if model.main_input_name == "pixel_values":
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        inputs["pixel_values"] = weight.new_zeros(1, config.num_channels, height, width)
    elif model.main_input_name == "input_features":
        inputs["input_features"] = weight.new_zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        choices = (2,) if type(model).__name__.endswith("ForMultipleChoice") else ()
        inputs["input_ids"] = torch.zeros(1, *choices, 4, dtype=torch.long, device=weight.device)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 3, dtype=torch.long, device=weight.device)
        if "input_ids" in inputs and isinstance(config.eos_token_id, int):
            inputs["input_ids"][:, -1] = config.eos_token_id  # where BART's classifiers look
    return inputs
