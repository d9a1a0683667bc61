"""What is timed beside a layer: a whole model, and a task's training step."""

import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.pytorch_utils import Conv1D

from hhbench import hosts, models
from hhbench.attention import ATTENTIONS, Attention
from hhbench.config import RunConfig, split_label
from hhbench.converter import kind_of
from hhbench.errors import UsageError
from hhbench.hosts.probe import learned_positions
from hhbench.profile.correctness import autocast, complaint
from hhbench.profile.request import MODES, Request, model_name
from hhbench.profile.subjects import FIRST, PREFILL, SLACK, TOKEN, TRAIN, WORKS, Subject, Workload, state_bytes
from hhbench.runner import prepare
from hhbench.task import TASKS, Batch
from hhbench.train import Schedule, attended_tokens, loader, parameter_groups

VOCAB = 1024  # of a model that is made for the profile
MATRICES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
BATCHES = 64  # of which a task's are chosen


class _Hosted(Subject):
    """Models that differ in their attention alone: what else they hold, they share."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request, self.device = request, device
        self._converted: dict[tuple[str, int], nn.Module] = {}

    def labels(self) -> list[str]:
        return list(self.request.attentions)

    def check(self, label: str, dtype: torch.dtype) -> tuple[str, bool]:
        """Of the attention in the shape of the first layer."""
        name, options = split_label(label)
        shape = hosts.host_layers(self._base(self.lengths[0]))[0].shape
        shape = dataclasses.replace(shape, max_len=max(shape.max_len, 512), dropout=0.0)
        torch.manual_seed(self.request.seed)
        module = ATTENTIONS.get(name).build(shape, **options).to(self.device)
        return complaint(module, dtype, gradients="train" in self.modes, decodes="decode" in self.modes)

    def _base(self, length: int) -> nn.Module:
        """The model with its own softmax."""
        raise NotImplementedError

    def _with(self, label: str, length: int, context: int) -> nn.Module:
        key = label, length
        if key not in self._converted:
            base = self._base(length)
            shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
            model = copy.deepcopy(base, shared)
            name, options = split_label(label)
            torch.manual_seed(self.request.seed)
            self._converted[key] = hosts.convert(model, name, context=context, **options).to(self.device)
        return self._converted[key]


def _flops(model: nn.Module, batch_size: int, new: int, every: int, *, heads: int) -> int | None:
    """Of a forward pass: two for each weight of a matrix and token, and what the attentions state.

    Args:
        new, every: tokens of a sequence that are read, and that attentions see.
        heads: tokens of a sequence that the head over the vocabulary is asked for.
    """
    inside = {id(m) for part in hosts.attentions(model) for m in part.modules()}
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, MATRICES) and id(m) not in inside]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_size = 0 if head is None else head.weight.numel()
    stated = [part.flops(new, every, batch_size=batch_size) for part in hosts.attentions(model)]
    if any(one is None for one in stated):
        return None
    matrices = (sum(weights) - head_size) * new + head_size * heads
    return 2 * batch_size * matrices + sum(one for one in stated if one is not None)


class ModelSubject(_Hosted):
    """A whole decoder or encoder: `gpt2-LAYERSxWIDTHxHEADS` with random weights, or a model that is there."""

    def __init__(self, request: Request, device: torch.device) -> None:
        super().__init__(request, device)
        self.lengths = request.lengths
        self.batch_size = request.batch_size or 1
        self.decodes = self._load()
        self.modes = request.modes or (MODES if self.decodes else (TRAIN, PREFILL))
        if not self.decodes and "decode" in self.modes:
            raise UsageError(f"{request.model} is an encoder and writes no text: --mode train,prefill")
        self.limit = learned_positions(self.model)
        count = sum(p.numel() for p in self.model.parameters())
        self.facts = {"parameters": count}
        self.title = (
            f"the model {model_name(str(request.model))}, {count / 1e6:,.1f} M parameters, batch {self.batch_size}; "
            "tokens are random; a training step is forward and backward, without the optimizer"
        )

    def _load(self) -> bool:
        """Load the model, and say whether it writes text."""
        name = str(self.request.model)
        torch.manual_seed(self.request.seed)
        if name.startswith("gpt2-"):
            self.model = models.gpt2(name, vocab=VOCAB, max_len=max(self.lengths) + SLACK, dropout=0.0)
            kind = "decoder"
        else:
            kind = kind_of(name)
            if kind == "vision":
                raise UsageError(f"{name} takes images, whose size is its length: profile it with --task imagenet")
            auto = transformers.AutoModelForCausalLM if kind == "decoder" else transformers.AutoModel
            self.model = models.transformers_model(auto, name, pretrained=True, dropout=0.0)
        self.model.to(self.device)
        return kind == "decoder"

    def works(self, label: str) -> tuple[str, ...]:
        return tuple(work for mode in self.modes for work in WORKS[mode])

    def workload(self, label: str, work: str, dtype: torch.dtype, length: int) -> Workload:
        more = {TRAIN: 0, PREFILL: 0, FIRST: 1, TOKEN: SLACK}[work]
        if self.limit is not None and length + more > self.limit:
            raise UsageError(f"the model has {self.limit:,} positions")
        model = self._with(label, 0, max(self.lengths) + SLACK)
        make: Callable[..., Workload] = {
            TRAIN: self._train, PREFILL: self._prefill, FIRST: self._first, TOKEN: self._token,
        }[work]  # fmt: skip
        return make(model, dtype, length)

    def _base(self, length: int) -> nn.Module:
        return self.model

    def _ids(self, length: int) -> Tensor:
        known = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return torch.randint(known, (self.batch_size, length), device=self.device)

    def _train(self, model: nn.Module, dtype: torch.dtype, length: int) -> Workload:
        parameters = list(model.parameters())

        def prepare() -> Callable[[], object]:
            ids = self._ids(length)

            def run() -> None:
                model.train()
                for parameter in parameters:
                    parameter.grad = None
                with autocast(self.device, dtype):
                    if self.decodes:
                        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                    else:
                        loss = model(input_ids=ids).last_hidden_state.float().square().mean()
                loss.backward()

            return run

        forward = _flops(model, self.batch_size, length, length, heads=length)
        return self._work(
            prepare, model, dtype, length, self.batch_size * length, None if forward is None else 3 * forward
        )

    def _prefill(self, model: nn.Module, dtype: torch.dtype, length: int) -> Workload:
        def prepare() -> Callable[[], object]:
            ids = self._ids(length)
            return lambda: self._forward(model, dtype, ids)

        flops = _flops(model, self.batch_size, length, length, heads=1)
        return self._work(prepare, model, dtype, length, self.batch_size * length, flops)

    def _first(self, model: Any, dtype: torch.dtype, length: int) -> Workload:
        if not self._caches(model):
            return self._prefill(model, dtype, length)

        def prepare() -> Callable[[], object]:
            ids = self._ids(length)
            return lambda: self._forward(model, dtype, ids, self._cache(model))

        flops = _flops(model, self.batch_size, length, length, heads=1)
        return self._work(prepare, model, dtype, length, self.batch_size * length, flops)

    def _token(self, model: Any, dtype: torch.dtype, length: int) -> Workload:
        if not self._caches(model):
            work = self._prefill(model, dtype, length + 1)
            note = "a layer has no state: reads all again"
            return dataclasses.replace(work, tokens=self.batch_size, state_bytes=None, note=note)
        read = self._cache(model)
        self._forward(model, dtype, self._ids(length), read)

        def prepare() -> Callable[[], object]:
            cache, ids = copy.deepcopy(read), self._ids(1)
            return lambda: self._forward(model, dtype, ids, cache)

        flops = _flops(model, self.batch_size, 1, length + 1, heads=1)
        return self._work(prepare, model, dtype, length, self.batch_size, flops)

    def _forward(self, model: nn.Module, dtype: torch.dtype, ids: Tensor, cache: Cache | None = None) -> Any:
        """The logits of the last token."""
        model.eval()
        settings: dict[str, Any] = {"use_cache": cache is not None, "logits_to_keep": 1} if self.decodes else {}
        if cache is not None:
            known = inspect.signature(model.forward).parameters
            settings["cache" if "cache" in known else "past_key_values"] = cache  # transformers renamed it
        with torch.no_grad(), autocast(self.device, dtype):
            return model(input_ids=ids, **settings)

    def _caches(self, model: nn.Module) -> bool:
        """Whether every layer keeps something to go on from: a mixer without a state has no keys either."""
        return all(part.has_state or isinstance(part, Attention) for part in hosts.attentions(model))

    def _cache(self, model: Any) -> Cache:
        cache = hosts.StateCache(model)
        return cache if cache.states else DynamicCache()

    def _work(
        self,
        prepare: Callable[[], Callable[[], object]],
        model: nn.Module,
        dtype: torch.dtype,
        length: int,
        tokens: int,
        flops: int | None,
    ) -> Workload:
        states = [state_bytes(part, length, dtype, self.batch_size) for part in hosts.attentions(model)]
        state = None if any(one is None for one in states) else sum(one for one in states if one is not None)
        return Workload(prepare=prepare, tokens=tokens, flops=flops, state_bytes=state if self.decodes else None)


class TaskSubject(_Hosted):
    """A task's training step at mini: its model, its batches, its loss and its optimizer.

    Batches are those of the median number of tokens, another one in each round and the same for every attention.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        super().__init__(request, device)
        self.modes = (TRAIN,)
        task = str(request.task)
        self.task = TASKS.get(task).build()
        self.config = prepare(self._config(request.attentions[0])).config
        self.lengths = request.lengths or (int(self.config.max_len or 0),)
        c = self.config
        self.facts = {"dataset": c.dataset, "host": c.model, "preset": c.preset, "regime": c.regime}
        self.title = (
            f"{task} / {self.task.dataset(str(c.dataset)).title} at mini: {c.model}, batch {c.batch_size}; a step is "
            "forward, backward and the optimizer, on batches of the median number of tokens"
        )
        self._data: dict[int, tuple[nn.Module, list[Batch]]] = {}

    def _config(self, label: str, length: int | None = None) -> RunConfig:
        name, options = split_label(label)
        task = TASKS.get(str(self.request.task)).build()
        return RunConfig(
            task=str(self.request.task),
            dataset=task.suites["mini"][0],
            attn=name,
            option=tuple(sorted(options.items())),
            max_len=length,
            batch_size=self.request.batch_size,
            seed=self.request.seed,
        )

    def works(self, label: str) -> tuple[str, ...]:
        return (TRAIN,)

    def _base(self, length: int) -> nn.Module:
        return self._prepared(length)[0]

    def _prepared(self, length: int) -> tuple[nn.Module, list[Batch]]:
        """The model, and batches near the median number of tokens."""
        if length not in self._data:
            config = prepare(self._config("softmax", length)).config
            data = self.task.load_data(config)
            torch.manual_seed(self.request.seed)
            model = self.task.build_model(config, data).to(self.device)
            batches: list[Batch] = []
            for batch in loader(data.train, data, config, train=True, seed=self.request.seed):
                batches.append(_moved(batch, self.device))
                if len(batches) == BATCHES:
                    break
            batches.sort(key=attended_tokens)
            middle, count = attended_tokens(batches[len(batches) // 2]), self.request.rounds
            near = sorted(batches, key=lambda batch: abs(attended_tokens(batch) - middle))[:count]
            self._data[length] = model, near
        return self._data[length]

    def workload(self, label: str, work: str, dtype: torch.dtype, length: int) -> Workload:
        config = prepare(self._config(label, length)).config
        _, batches = self._prepared(length)
        model = self._with(label, length, length)
        schedule = Schedule(
            0.0, 1.0, 0.0, float(config.beta2 or 0.999), 0.0, float(config.clip or 0)
        )  # a rate of 0: the weights are everyone's
        groups = parameter_groups(model, model.parameters(), schedule)
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, schedule.beta2), fused=fused)
        for parameter in itertools.chain.from_iterable(group["params"] for group in groups):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # its moments are there before a step is watched
        optimizer.zero_grad()
        turn = iter(range(2**31))

        def prepare_step() -> Callable[[], object]:
            batch = batches[next(turn) % len(batches)]
            return functools.partial(self._step, model, batch, dtype, optimizer, schedule.clip)

        rows, longest = self._padded(model, batches[0], dtype)
        forward = _flops(model, rows, longest, longest, heads=longest)
        flops = None if forward is None else 3 * forward
        return Workload(prepare=prepare_step, tokens=attended_tokens(batches[0]), flops=flops, state_bytes=None)

    def _padded(self, model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[int, int]:
        """The sequences of a batch, and the tokens of each with its padding, as the first attention sees them."""
        seen: list[tuple[int, int]] = []

        def note(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append((inputs[0].shape[0], inputs[0].shape[-2]))

        handle = hosts.attentions(model)[0].register_forward_pre_hook(note)
        try:
            with torch.no_grad(), autocast(self.device, dtype):
                self.task.step(model, batch)
        finally:
            handle.remove()
        return seen[0]

    def _step(
        self, model: nn.Module, batch: Batch, dtype: torch.dtype, optimizer: torch.optim.Optimizer, clip: float
    ) -> None:
        model.train()
        optimizer.zero_grad()
        with autocast(self.device, dtype):
            out = self.task.step(model, batch)
        (out.loss / out.count).backward()  # type: ignore[no-untyped-call]
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return value
