"""Text from a converted decoder, and what it keeps of the tokens while it writes."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, TextStreamer

from hhbench import models
from hhbench.errors import DataError, UsageError
from hhbench.hosts.cache import StateLayer, held_bytes


@dataclass(frozen=True)
class Kept:
    """What a model keeps of the tokens so far, measured after one token.

    Attributes:
        constant: layers that hold a state.
        constant_bytes: of these states, for all beams together.
        growing: layers that keep every key and value.
        token_bytes: what these take for each token, for all beams together.
        again: it keeps nothing: a layer without state and without keys has every token read again at each step.
    """

    constant: int
    constant_bytes: int
    growing: int
    token_bytes: int
    again: bool

    def line(self) -> str:
        """For a person."""
        if self.again:
            return "nothing is kept: every token is read again at each step"
        said = []
        if self.constant:
            said.append(f"{_layers(self.constant, 'hold')} a constant state: {self.constant_bytes:,} bytes")
        if self.growing:
            said.append(f"{_layers(self.growing, 'keep')} every key and value: {self.token_bytes:,} bytes per token")
        return "; ".join(said)


@dataclass(frozen=True)
class Written:
    """What was generated.

    Attributes:
        text: without the prompt.
        num_prompt: tokens of the prompt.
        num_tokens: new tokens.
        seconds: from the prompt to the last token.
        cache_bytes: what the cache held at the end, for all beams together; 0 where there is none.
    """

    text: str
    num_prompt: int
    num_tokens: int
    seconds: float
    cache_bytes: int

    def line(self) -> str:
        """The numbers for a person."""
        return (
            f"{self.num_tokens} tokens after {self.num_prompt} of the prompt in {self.seconds:.2f} s: "
            f"{self.num_tokens / self.seconds:.1f} tokens/s; the cache holds {self.cache_bytes:,} bytes"
        )


class Writer:
    """A converted decoder with its tokenizer.

    Args:
        folder: what `hhbench convert` or a run wrote.
        attn: a user's own attention, which a folder may not name by itself: `file.py:Class`.

    Raises:
        UsageError: it is an encoder, a vision transformer or a decoder without its language-model head.
        DataError: no tokenizer lies in the folder.
        HHBenchError: the folder holds no hhbench model, or a damaged one.
    """

    def __init__(self, folder: Path, *, attn: str | None = None) -> None:
        model = models.load(folder, attn=attn)
        self.model = _checked(model).to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = models.tokenizer(str(models.model_folder(folder)))

    def kept(self, *, num_beams: int = 1) -> Kept:
        """What the model keeps of the tokens, asked of the model itself by one token."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        cache = self._generate(token, max_new_tokens=1, num_beams=num_beams)[1]
        layers = [] if cache is None else list(cache.layers)
        constant = [held_bytes(layer) for layer in layers if isinstance(layer, StateLayer)]
        growing = [held_bytes(layer) for layer in layers if not isinstance(layer, StateLayer)]
        return Kept(len(constant), sum(constant), len(growing), sum(growing), cache is None)

    def write(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        num_beams: int = 1,
        stream: bool = False,
    ) -> Written:
        """Go on from a prompt.

        Args:
            prompt: a text.
            max_new_tokens: at most so many; fewer where the model ends the text.
            temperature: sample with it; greedy if neither this nor `top_p` is given.
            top_p: sample from the likeliest tokens that have this probability together.
            seed: of the samples.
            num_beams: beam search with so many.
            stream: print the text as it comes; with beams, when it is complete.

        Raises:
            UsageError: a setting is out of its range, the prompt is empty, or the model has too few positions.
            DataError: the tokenizer isn't the model's.
        """
        _check_range("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
        _check_range("num_beams", num_beams, num_beams >= 1, "at least 1")
        _check_range("temperature", temperature, temperature is None or temperature > 0, "above 0")
        _check_range("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1")
        ids = self._read(prompt)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        if temperature is not None or top_p is not None:  # top_k, the library's default, was not asked for
            settings |= {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}
        if stream and num_beams == 1:
            settings["streamer"] = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        torch.manual_seed(seed)
        start = time.perf_counter()
        sequence, cache = self._generate(ids, **settings)
        seconds = time.perf_counter() - start
        new = sequence[ids.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        if stream and num_beams > 1:
            print(text)
        held = 0 if cache is None else sum(held_bytes(layer) for layer in cache.layers)
        return Written(text, ids.shape[1], len(new), seconds, held)

    def _read(self, prompt: str) -> torch.Tensor:
        """The prompt's tokens, [1, N]."""
        if not prompt.strip():
            raise UsageError("the prompt is empty: give a text to go on from")
        ids: torch.Tensor = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        known = self.model.get_input_embeddings().num_embeddings
        if ids.max() >= known:
            raise DataError(f"the tokenizer knows token {int(ids.max())} and the model {known}: it isn't the model's")
        return ids.to(self.model.device)

    def _generate(self, ids: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, Cache | None]:
        """The whole sequence [N], and the cache after it."""
        end = self.model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        pad = self.tokenizer.pad_token_id
        made = self.model.generate(
            ids,
            **{"do_sample": False, "return_dict_in_generate": True, "eos_token_id": end} | settings,
            pad_token_id=pad if pad is not None else end[0] if isinstance(end, list) else end,
        )
        return made.sequences[0], next((one for one in made.values() if isinstance(one, Cache)), None)


def _checked(model: nn.Module) -> PreTrainedModel:
    """The model, if it is one that writes text."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise UsageError(
            f"{type(model).__name__} writes no text: only a decoder with its language-model head (LlamaForCausalLM, "
            "GPT2LMHeadModel ...) does"
        )
    return model


def _check_range(name: str, value: Any, holds: bool, what: str) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} must be {what}, not {value}")


def _layers(count: int, verb: str) -> str:
    return f"{count} layers {verb}" if count != 1 else f"1 layer {verb}s"
