"""`hhbench new`: a working attention or task, with its docstring and test, for its author to change.

In a checkout the files go where built-ins lie, and everything finds them by name. Elsewhere they go into a folder, and
the command line takes them by path.
"""

import ast
import importlib.util
import keyword
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from hhbench.attention import ATTENTIONS
from hhbench.errors import UsageError
from hhbench.task import TASKS

Kind = Literal["attention", "task"]
Rung = Literal["map", "attention", "mixer"]

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, if this is one
HOMES = {"attention": "baselines", "task": "tasks"}


@dataclass(frozen=True)
class Written:
    """What was made: the files, and the commands that try it, to be pasted where the user stands."""

    files: tuple[Path, ...]
    commands: tuple[str, ...]


def new(kind: Kind, name: str, *, rung: Rung | None = None, folder: Path | None = None) -> Written:
    """Write the file and its test.

    Args:
        kind: what to make.
        name: what the command line shall call it; the file has underscores for its dashes.
        rung: of an attention: where the new thought enters; "map" unless said.
        folder: where to write, as a user's own file; None is the checkout that the user stands in, or else the
            current folder.

    Raises:
        UsageError: the name can't be or is taken, a file is there already, or the folder can't be written.
    """
    if kind == "task" and rung:
        raise UsageError("--rung says where an attention enters; a task has none")
    name, module = _checked_name(kind, name)
    home, cls = HOMES[kind], "".join(word.capitalize() for word in name.split("-"))
    in_checkout = folder is None and _in_checkout()
    if in_checkout:
        path, test = ROOT / home / f"{module}.py", ROOT / "tests" / home / f"test_{module}.py"
        # pytest tells test files apart by their names alone.
        others = [other for other in (ROOT / "tests").rglob(test.name) if other != test]
    else:
        folder = folder or Path()
        if folder.resolve() in [ROOT / place for place in HOMES.values()]:
            raise UsageError(f"{folder} holds hhbench's own: leave --folder out to write there")
        path, test = folder / f"{module}.py", folder / f"test_{module}.py"
        others = []
    for there in [p for p in (path, test) if p.exists()] + others:
        raise UsageError(f"{_shown(there)} exists already, and nothing is overwritten; take another name")
    if not in_checkout and importlib.util.find_spec(module):
        raise UsageError(f"{module}.py would hide the module {module}, which Python finds already; take another name")
    reference = f'"{name}"' if in_checkout else f"f\"{{Path(__file__).with_name('{module}.py')}}:{cls}\""
    values = {
        "name": name,
        "cls": cls,
        "reference": reference,
        "pathlib": "" if in_checkout else "from pathlib import Path\n\n",
    }
    templates = ATTENTION_TEMPLATES[rung or "map"] if kind == "attention" else (TASK, TASK_TEST)
    source, source_of_test = (Template(template).substitute(values) for template in templates)
    imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    if cls in {alias.name for node in imports for alias in node.names}:
        raise UsageError(f"a class {cls} would hide the {cls} that its file imports; take another name")
    try:
        for file, text in ((path, source), (test, source_of_test)):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as out:
                out.write(text)
    except OSError as error:
        raise UsageError(f"{error.filename or path} can't be written: {error.strerror}") from error
    called = shlex.quote(name if in_checkout else f"{_shown(path)}:{cls}")
    pytest = f"python -m pytest {shlex.quote(str(_shown(test)))}"
    commands: tuple[str, ...]
    if kind == "attention":
        commands = (f"hhbench check {called}", pytest, f"hhbench run --task recall --attn {called}")
    else:
        commands = (pytest, f"hhbench run --task {called} --attn softmax,hedgehog")
    return Written((_shown(path), _shown(test)), commands)


def _checked_name(kind: Kind, given: str) -> tuple[str, str]:
    """The name with dashes and with underscores."""
    reserved = {word.lower() for word in keyword.kwlist}  # None is one too, and would be the class
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", given) or given in reserved or not 2 <= len(given) <= 30:
        raise UsageError(
            f"{given!r} can't be a name: take 2 to 30 lower-case letters and digits, a letter first, words joined by "
            "dashes, as in my-map; no keyword of Python"
        )
    name, module = given.replace("_", "-"), given.replace("-", "_")
    taken = {"attention": ATTENTIONS.names(), "task": TASKS.names()}
    for owner, names in taken.items():  # of either kind: `hhbench show NAME` takes both
        if name in names:
            raise UsageError(f"{owner} {name!r} is there already; take another name")
    if kind == "attention" and name == "all":
        raise UsageError("--attn all means every attention; take another name")
    return name, module


def _in_checkout() -> bool:
    return (ROOT / "baselines").is_dir() and (ROOT / "tests").is_dir() and Path.cwd().is_relative_to(ROOT)


def _shown(path: Path) -> Path:
    """As short as it can be pasted."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- templates -------------------------------------------------------------------------------------------------

MAP = '''"""$name: softplus with a learned sharpness."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hhbench.attention import FeatureMap, MixerShape, register_attention


# paper: authors, year, equation. cost: of a layer, by N tokens, D head width, F features, E value width. recipe:
# "no-transfer" where nothing can be taught. Also: directions=("causal",) if it can't serve both, and version, which
# you raise when you change what it computes.
@register_attention(paper="not published", cost="N F E", recipe="hedgehog")
class $cls(FeatureMap):
    """phi(x) = softplus(s_h x): [B, H, N, D] -> [B, H, N, F], F = D. s_h is learned and begins at 1.

    Say here where the formula comes from, and where you differ on purpose from public code.

    Args:
        shared_heads: one s for all heads.
    """

    # A keyword-only argument is an option: --option shared_heads=true, and a label of its own in the tables.
    def __init__(self, shape: MixerShape, *, shared_heads: bool = False) -> None:
        super().__init__(shape)  # sets feature_dim to D: set it again if F is another
        self.sharpness = nn.Parameter(torch.ones(1 if shared_heads else shape.num_heads, 1, 1))

    # Queries and keys each get a map of their own. Features are not negative, and a token's depend on no other token.
    # Override map_queries and map_keys instead if you need positions, or if features can overflow: keys then come with
    # the logarithm of a scale.
    def forward(self, x: Tensor) -> Tensor:
        return softplus(x * self.sharpness.to(x.dtype))
'''

MAP_TEST = '''"""$name: what pins it down."""

${pathlib}import torch

from hhbench.attention import ATTENTIONS, MixerShape

SPEC = ATTENTIONS.get($reference)
SHAPE = MixerShape(dim=8, num_heads=2, num_kv_heads=2, head_dim=4, scale=0.5, max_len=64, causal=True)


def test_features_by_hand() -> None:
    """softplus(log x) = log(1 + x), and twice the sharpness squares x."""
    x = torch.tensor([1.0, 3.0]).log().expand(1, 2, 1, 2)
    feature_map = SPEC.part(SHAPE)
    with torch.no_grad():
        feature_map.sharpness[1] = 2
    expected = torch.tensor([[2.0, 4.0], [2.0, 10.0]]).log().view(1, 2, 1, 2)
    torch.testing.assert_close(feature_map(x), expected)


def test_it_learns_one_number_a_head() -> None:
    """Queries and keys have maps of their own."""
    for options, count in (({}, 4), ({"shared_heads": True}, 2)):
        module = SPEC.build(SHAPE, **options)
        assert sum(p.numel() for p in module.parameters()) == count
'''

ATTENTION = '''"""$name: a mean weighted by sigmoids."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from hhbench.attention import (
    Attention,
    MixerShape,
    check_inputs,
    masked_softmax,
    register_attention,
    repeat_heads,
    sum_dtype,
    visible_keys,
    zero_padding,
)
from hhbench.window import num_pairs


# paper: authors, year, equation. cost: of a layer, by N tokens, D head width, E value width. recipe: "no-transfer"
# where nothing can be taught. Also: directions=("causal",) if it can't serve both, and version, which you raise when
# you change what it computes.
@register_attention(paper="not published", cost="N^2 D", recipe="hedgehog")
class $cls(Attention):
    """weights_ij = sigmoid(scale q_i.k_j - t_h) / sum_j sigmoid(scale q_i.k_j - t_h): [B, H, N, M].

    Far below the threshold t_h these are softmax's, far above it they are even. t_h is learned and begins at 0.
    Say here where the formula comes from, and where you differ on purpose from public code.

    Args:
        shared_heads: one t for all heads.
    """

    # Without weights, set has_weights = False and override quadratic, the definition over all pairs of tokens.

    # A keyword-only argument is an option: --option shared_heads=true, and a label of its own in the tables.
    def __init__(self, shape: MixerShape, *, shared_heads: bool = False) -> None:
        super().__init__(shape)
        self.threshold = nn.Parameter(torch.zeros(1 if shared_heads else shape.num_heads, 1, 1))

    # q [B, H, N, D], k [B, G, M, D], v [B, G, M, E]. Queries are the last N of the M tokens.
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        check_inputs(self.shape, q, k, v, key_mask, positions)
        weights = self.weights(q, k, key_mask=key_mask, positions=positions)
        v = repeat_heads(zero_padding(v, key_mask), self.shape.num_heads)
        with torch.autocast(q.device.type, enabled=False):
            return (weights @ v.to(weights.dtype)).to(q.dtype)

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        check_inputs(self.shape, q, k, None, key_mask, positions)
        dtype = sum_dtype(q)  # of all sums, under autocast too
        q, k = (zero_padding(x.to(dtype), key_mask) for x in (q, k))  # nothing that lies there may spread
        with torch.autocast(q.device.type, enabled=False):
            scores = q @ repeat_heads(k, self.shape.num_heads).mT * self.shape.scale
            scores = logsigmoid(scores - self.threshold.to(dtype))
        visible = visible_keys(
            key_mask, causal=self.shape.causal, num_queries=q.shape[2], num_keys=k.shape[2], device=q.device
        )
        return masked_softmax(scores, visible)  # zeros for a query with no key to attend to

    # What `hhbench profile` calls FLOPs: of the cheapest way to compute the definition, additions counted.
    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        pairs = num_pairs(num_queries, num_keys, causal=self.shape.causal)
        return batch_size * self.shape.num_heads * pairs * 4 * self.shape.head_dim
'''

ATTENTION_TEST = '''"""$name: what pins it down."""

${pathlib}import pytest
import torch

from hhbench.attention import ATTENTIONS, MixerShape

SPEC = ATTENTIONS.get($reference)
SHAPE = MixerShape(dim=2, num_heads=2, num_kv_heads=2, head_dim=1, scale=1.0, max_len=64, causal=False)


def test_weights_by_hand() -> None:
    """sigmoid(log x) = x / (x + 1): scores log 1 and log 3 weigh 1/2 and 3/4."""
    q, k = torch.ones(1, 2, 2, 1), torch.tensor([1.0, 3.0]).log().view(1, 1, 2, 1).expand(1, 2, 2, 1)
    expected = torch.tensor([0.4, 0.6]).expand(1, 2, 2, 2)
    torch.testing.assert_close(SPEC.build(SHAPE).weights(q, k), expected)


@pytest.mark.parametrize("threshold", [-30.0, 30.0])
def test_its_limits_are_the_mean_and_softmax(threshold: float) -> None:
    q, k = torch.randn(2, 1, 2, 5, 1, dtype=torch.float64)
    module = SPEC.build(SHAPE).double()
    torch.nn.init.constant_(module.threshold, threshold)
    expected = torch.full((1, 2, 5, 5), 0.2).double() if threshold < 0 else (q @ k.mT).softmax(-1)
    torch.testing.assert_close(module.weights(q, k), expected, atol=1e-6, rtol=0)


def test_it_learns_one_number_a_head() -> None:
    for options, count in (({}, 2), ({"shared_heads": True}, 1)):
        module = SPEC.build(SHAPE, **options)
        assert sum(p.numel() for p in module.parameters()) == count
'''

MIXER = '''"""$name: a gated mean of the tokens."""

import torch
from torch import Tensor, nn

from hhbench.attention import (
    MixerShape,
    SequenceMixer,
    check_hidden_states,
    register_attention,
    sum_dtype,
    visible_keys,
)


# paper: authors, year, equation. cost: of a layer beside its projections, by N tokens and model width C. Also:
# directions=("causal",) if it can't serve both, and version, which you raise when you change what it computes.
@register_attention(paper="not published", cost="N C", recipe="replacement")
class $cls(SequenceMixer):
    """y_i = W (sigmoid(G x_i + b) * mean_j V x_j): [B, N, C] -> [B, N, C], over j <= i if causal, else over all.

    Say here where the formula comes from, and where you differ on purpose from public code.

    Args:
        gate_bias: whether there is b.
    """

    # A keyword-only argument is an option: --option gate_bias=false, and a label of its own in the tables.
    def __init__(self, shape: MixerShape, *, gate_bias: bool = True) -> None:
        super().__init__(shape)
        self.value = nn.Linear(shape.dim, shape.dim, bias=False)  # a bias would make something of padded tokens
        self.gate = nn.Linear(shape.dim, shape.dim, bias=gate_bias)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        x, values = self._values(x, key_mask)
        attended = torch.ones(x.shape[:2], device=x.device) if key_mask is None else key_mask
        attended = attended[..., None].to(values.dtype)
        if self.shape.causal:
            sums, counts = values.cumsum(1), attended.cumsum(1)
        else:
            sums, counts = values.sum(1, keepdim=True), attended.sum(1, keepdim=True)
        return self._gated(x, sums / counts.clamp_min(1))  # no token yet: zero

    # The definition over all pairs of tokens, which forward must equal.
    def quadratic(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        x, values = self._values(x, key_mask)
        B, N = x.shape[:2]
        visible = visible_keys(key_mask, causal=self.shape.causal, num_queries=N, num_keys=N, device=x.device)
        if visible is None:
            visible = torch.ones(1, 1, 1, N, dtype=torch.bool, device=x.device)
        pairs = visible.expand(B, 1, N, N)[:, 0].to(values.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._gated(x, pairs @ values / pairs.sum(-1, keepdim=True).clamp_min(1))

    # What `hhbench profile` calls FLOPs: of the cheapest way to compute the definition, additions counted.
    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        C = self.shape.dim
        return batch_size * (2 * C * C * (2 * num_queries + num_keys) + C * num_keys)

    def _values(self, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states with zeros at padded tokens, whatever lies there, and V x in the precision of the sums."""
        check_hidden_states(self.shape, x, key_mask)
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0.0)
        return x, self.value(x).to(sum_dtype(x))

    def _gated(self, x: Tensor, mean: Tensor) -> Tensor:
        out: Tensor = self.out(self.gate(x).sigmoid() * mean.to(x.dtype))
        return out.to(x.dtype)
'''

MIXER_TEST = '''"""$name: what pins it down."""

${pathlib}import pytest
import torch

from hhbench.attention import ATTENTIONS, MixerShape

SPEC = ATTENTIONS.get($reference)


def shape(causal: bool) -> MixerShape:
    return MixerShape(dim=4, num_heads=2, num_kv_heads=2, head_dim=2, scale=1.0, max_len=64, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_a_mean_of_the_tokens_that_are_seen(causal: bool) -> None:
    """With V and W the identity and the gate half open, tokens 2, 4 and 9 make means of 2, 3 and 5."""
    module = SPEC.build(shape(causal))
    torch.nn.init.eye_(module.value.weight)
    torch.nn.init.eye_(module.out.weight)
    torch.nn.init.zeros_(module.gate.weight)
    torch.nn.init.zeros_(module.gate.bias)
    x = torch.tensor([2.0, 4.0, 9.0])[None, :, None].expand(1, 3, 4)
    means = torch.tensor([2.0, 3.0, 5.0]) if causal else torch.tensor([5.0, 5.0, 5.0])
    torch.testing.assert_close(module(x), 0.5 * means[None, :, None].expand(1, 3, 4))


@pytest.mark.parametrize("causal", [True, False])
def test_it_equals_its_definition(causal: bool) -> None:
    module = SPEC.build(shape(causal)).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    key_mask = torch.arange(9) >= torch.tensor([[0], [3]])
    for mask in (None, key_mask):
        expected = module.quadratic(x, key_mask=mask)
        torch.testing.assert_close(module(x, key_mask=mask), expected, atol=1e-12, rtol=0)


def test_parameters() -> None:
    for options, count in (({}, 3 * 16 + 4), ({"gate_bias": False}, 3 * 16)):
        module = SPEC.build(shape(True), **options)
        assert sum(p.numel() for p in module.parameters()) == count
'''

ATTENTION_TEMPLATES: dict[Rung, tuple[str, str]] = {
    "map": (MAP, MAP_TEST),
    "attention": (ATTENTION, ATTENTION_TEST),
    "mixer": (MIXER, MIXER_TEST),
}

TASK = '''"""$name: name the first token of a sequence. Generated; nothing is fetched."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection

from hhbench import models
from hhbench.config import RunConfig
from hhbench.data import hash_text
from hhbench.errors import UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, register_task

VOCABULARY = 16


@register_task
class $cls(Task):
    """Score: at how many tokens of a sequence its first one is named. The host is a small GPT-2 with random weights.

    Say here where the task comes from (paper, section), and what you changed.
    """

    name = "$name"
    title = "First token"  # of its tables
    causal = True
    regimes = ("scratch", "finetuned-conversion")  # those that make sense; the first is the default
    # By the names of --dataset. Files of the package registry go into Dataset(files=...).
    datasets = {"first-token": Dataset("first-token", "accuracy", source="generated")}
    suites = {"mini": ("first-token",), "paper": ("first-token",)}  # what --task alone runs, by preset
    # version = 2: raise it when you change what is measured.

    # Every blank of RunConfig, for both presets. Say in a comment where a published value comes from.
    def settings(self, config: RunConfig) -> dict[str, Any]:
        paper = config.preset == "paper"
        return {
            "model": "gpt2-2x64x1" if paper else "gpt2-1x32x1",
            "max_len": 128 if paper else 16,
            "dropout": 0.0,
            "train_examples": 50_000 if paper else 4_096,
            "test_examples": 2_000 if paper else 512,
            "batch_size": 32,
            "epochs": 1.0,
            "lr": 3e-3,
            "teacher_epochs": 1.0,
            "teacher_lr": 3e-3,
            "transfer_epochs": 0.2,
            "transfer_lr": 1e-2,
            "weight_decay": 0.1,
            "beta2": 0.95,
            "warmup": 0.1,
            "clip": 1.0,
        }

    # What is wrong with the data or the settings is said here, before anything trains.
    def load_data(self, config: RunConfig) -> TaskData:
        length, tests = int(config.max_len or 0), int(config.test_examples or 0)
        if not (config.train_examples and tests):
            raise UsageError("examples are generated: --train-examples and --test-examples can't be 0")

        def split(count: int, seed: int) -> Split:
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
            return Split([{"tokens": row} for row in tokens], [length] * count)

        return TaskData(
            train=split(config.train_examples, 2),
            validation=split(tests, 1),  # picks checkpoints and learning rates; tests do not
            tests={"test": split(tests, 0)},
            collate=_collate,
            hashes={"first-token": hash_text(f"first-token {VOCABULARY} {length} version {self.version}")},
        )

    # With softmax, as it comes; hhbench replaces its attention.
    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        return models.gpt2(
            str(config.model),
            vocab=VOCABULARY,
            max_len=int(config.max_len or 0),
            dropout=float(config.dropout or 0),
            initializer_range=0.1,
        )

    # The loss is summed over `count` tokens; scores are one number an example.
    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits: Tensor = model(**batch["inputs"]).logits.float()
        labels = batch["labels"]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        scores = (logits.argmax(-1) == labels).float().mean(-1)
        return StepOutput(loss, labels.numel(), (scores,), scores)

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        return MetricCollection({"accuracy": MeanMetric()})


# "inputs" are the model's keyword arguments; the rest is for step.
def _collate(examples: Sequence[Example]) -> Batch:
    tokens = torch.stack([example["tokens"] for example in examples])
    return {
        "inputs": {"input_ids": tokens, "use_cache": False},
        "labels": tokens[:, :1].expand_as(tokens),
        "num_tokens": tokens.numel(),
    }
'''

TASK_TEST = '''"""$name: what is asked, what is right, and that it can be learned."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import one_hot

from hhbench.config import RunConfig
from hhbench.runner import prepare, run
from hhbench.task import TASKS, TaskData

NAME = $reference
TASK = TASKS.get(NAME).build()
CONFIG = prepare(RunConfig(task=NAME, attn="softmax", dataset="first-token")).config
DATA = TASK.load_data(CONFIG)


class Oracle(nn.Module):
    """Answers with given tokens."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.logits = one_hot(answers, 16).float() * 50

    def forward(self, **_: object) -> "Oracle":
        return self


def test_the_first_token_is_asked_for_everywhere() -> None:
    batch = DATA.collate(DATA.train.examples[:4])
    tokens, labels = batch["inputs"]["input_ids"], batch["labels"]
    assert labels.shape == tokens.shape == (4, 16)
    assert (labels == tokens[:, :1]).all()
    assert batch["num_tokens"] == 64


def test_splits_differ_and_come_again() -> None:
    def rows(data: TaskData) -> list[list[tuple[int, ...]]]:
        splits = (data.train, data.validation, data.tests["test"])
        return [[tuple(example["tokens"].tolist()) for example in split.examples] for split in splits]

    train, validation, test = map(set, rows(DATA))
    assert not train & validation and not train & test and not validation & test
    assert rows(TASK.load_data(CONFIG)) == rows(DATA)


def test_the_score_is_the_share_of_right_tokens() -> None:
    batch = DATA.collate(DATA.train.examples[:2])
    answers = batch["labels"].clone()
    answers[1, :4] = (answers[1, :4] + 1) % 16
    step = TASK.step(Oracle(answers), batch)
    assert step.scores.tolist() == [1.0, 0.75]
    assert step.count == 32
    metrics = TASK.metrics(DATA, CONFIG)
    metrics.update(*step.metric_inputs)
    assert float(metrics.compute()["accuracy"]) == 0.875


def test_softmax_learns_it(tmp_path: Path) -> None:
    """Guessing is right once in 16 times, and at the first token always."""
    result = run(RunConfig(task=NAME, attn="softmax", dataset="first-token", accelerator="cpu", out=tmp_path))
    assert result.score.value > 0.5
'''
