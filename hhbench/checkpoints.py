"""What an interrupted stage goes on from: checkpoints between two optimizer steps, and the weights of a finished stage.

A file is written aside, renamed when it is whole, and carries the hash of its content in its name. One that was cut or
changed is passed over for the one before. Nothing is unpickled but tensors and plain values.
"""

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hhbench import stopping
from hhbench.ranks import barrier, from_rank_zero, gathered, largest_over_ranks, rank, world_size

log = logging.getLogger("hhbench")

KEPT = 2  # checkpoints of a stage: the newest, and the one before it


# ---- files that prove themselves -------------------------------------------------------------------------------


def write_hashed(folder: Path, stem: str, suffix: str, write: Callable[[Path], object]) -> Path:
    """Have `write` fill a file, and name it `stem-HASH.suffix` once it is whole and on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{stem}.part"
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        path = folder / f"{stem}-{_hash(aside)}{suffix}"
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def newest(folder: Path, stem: str, suffix: str) -> Path | None:
    """The last file, by name, whose content is what its name says; on every rank what rank 0 finds."""
    found = None
    for path in sorted(folder.glob(f"{stem}-*{suffix}"), reverse=True) if rank() == 0 else ():
        if path.stem.rpartition("-")[2] == _hash(path):
            found = path
            break
        log.warning("%s is damaged: going on without it", path)
    return from_rank_zero(found)  # type: ignore[no-any-return]


# ---- a stage that is finished ----------------------------------------------------------------------------------

FINISHED = "finished"


def save_finished(folder: Path, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Keep what a stage changed and what it cost, in place of its checkpoints, until the run's result is written. A
    disk without room costs the time of doing it again, should the run be interrupted, and not the run.
    """
    if rank() == 0:
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            write_hashed(
                folder,
                FINISHED,
                ".safetensors",
                lambda path: save_file(whole, path, metadata={"report": json.dumps(dict(report))}),
            )
        except Exception as error:  # safetensors has an error of its own for a full disk
            log.warning("%s can't be written: %s", folder / FINISHED, error)
        for path in folder.glob("step-*.ckpt"):
            path.unlink(missing_ok=True)
    barrier()


def load_finished(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_finished` kept; None if the stage isn't finished."""
    path = newest(folder, FINISHED, ".safetensors")
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["report"])  # noqa: SIM118


def forget(folder: Path) -> None:
    """Delete what stages below a folder kept."""
    if rank() == 0:
        for pattern in ("step-*.ckpt", f"{FINISHED}-*.safetensors", ".*.part"):
            for path in folder.rglob(pattern):
                path.unlink(missing_ok=True)
    barrier()


# ---- a stage under way -----------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain values."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def steps_taken(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """The epoch that a checkpoint lies in, and the optimizer steps taken in it."""
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]["current"]["completed"]
    return loops["epoch_progress"]["current"]["processed"], batches // checkpoint["accumulation"]


def adapt(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Lightning counts batches, of which other devices may need another number for the same step."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["current"], progress["total"]):
        for name, count in counts.items():
            counts[name] = count // checkpoint["accumulation"] * accumulation
    checkpoint["accumulation"] = accumulation


class Checkpoints(Callback):
    """Keeps a stage's two last checkpoints, written every so many minutes, on Ctrl-C, and when a cluster's signal asks.

    They lie between two optimizer steps and hold the state of every rank's random numbers: what is dropped out after
    one is what would have been.

    Args:
        folder: of the checkpoints, `step-NUMBER-HASH.ckpt`.
        accumulation: batches per optimizer step.
        minutes: between two of them: what a machine that dies takes with it, at most.
    """

    def __init__(self, folder: Path, accumulation: int, *, minutes: float) -> None:
        self.folder, self.accumulation, self.seconds = folder, accumulation, 60 * minutes
        self._saved = 0.0
        self._everywhere: list[dict[str, Any]] = []  # the same of each rank, while a checkpoint is written
        self._resumed: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._everywhere}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["random"]

    def on_train_start(self, *args: Any) -> None:
        stopping.heed()  # Lightning has set its own handler for SIGTERM by now, which broadcasts wherever it comes
        self._saved = time.monotonic()
        if rank() > 0:  # dropout of its own; what resumes with as many ranks has it all again in a moment
            torch.manual_seed(torch.initial_seed() + 1_000_003 * rank())

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.accumulation:
            return
        if len(self._resumed) == world_size():
            set_random_state(self._resumed[rank()])
        self._resumed = []
        # Validation and the order of a new epoch lie behind: nothing is between this and the step.
        due = rank() == 0 and time.monotonic() - self._saved >= self.seconds
        agreed = largest_over_ranks(max(stopping.noted(), stopping.SAVE * due), module.device)
        if agreed and trainer.global_step:
            self._save(trainer)
        stopping.stop(agreed, f"after step {trainer.global_step}")

    def _save(self, trainer: lightning.Trainer) -> None:
        # Lightning counts the batch that is under way, and would validate a step early ever after.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        kept = progress.state_dict()
        progress.total.ready = progress.total.completed
        self._everywhere = gathered(random_state())
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        progress.load_state_dict(kept)
        if rank() == 0:
            try:
                path = write_hashed(
                    self.folder, f"step-{trainer.global_step:08d}", ".ckpt", lambda aside: torch.save(content, aside)
                )
                for old in sorted(self.folder.glob("step-*.ckpt"))[:-KEPT]:
                    old.unlink(missing_ok=True)
                log.debug("checkpoint: %s", path)
            except (OSError, RuntimeError) as error:  # a full disk costs the checkpoint, not the run
                log.warning("%s can't be written: %s", self.folder / f"step-{trainer.global_step:08d}.ckpt", error)
        barrier()
        self._saved = time.monotonic()


def random_state() -> dict[str, Any]:
    """The state of this process's generators, as tensors and plain values."""
    asked = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # `is_available` would ask the driver
    cuda = {"cuda": torch.cuda.get_rng_state()} if asked else {}
    legacy: Any = np.random.get_state()  # what libraries draw from
    name, keys, *rest = legacy
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
        **cuda,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` found."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
