"""The folder of a training run, and how a run resumes from it.

    run.json                  what the run depends on, for readers and for ``lora-delta generate``
    metrics.jsonl             a line for each step
    checkpoint.pt             the state after a step, replaced atomically
    checkpoint.previous.pt    the one before: the run resumes from it if checkpoint.pt is damaged
    best.pt                   the generator that did best on held-out conditions, if the run has an evaluation
    texts-…, held_out-…       tokenized texts; they can be made again
    conditions/               hidden states of their conditions; they can be made again

The checkpoint is authoritative: the log is repaired to match it. ``torch.load`` reads checkpoints; the log is JSON
lines.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from ..distributed import Ranks
from ..files import UNFINISHED, folder_lock, replaces, write_json
from ..identity import Identity

RUN, METRICS, CHECKPOINT, PREVIOUS = "run.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt"
BEST = "best.pt"
_GENERATOR = {"identity": dict, "progress": dict, "generator": dict}
_HOLDS = {**_GENERATOR, "optimizer": dict}

Metrics = dict[str, float]


@dataclass
class Progress:
    """How far a run has got.

    Attributes:
        steps: how many are done, including skipped ones.
        skipped: how many of them changed nothing because the loss or the gradient was not finite.
        skipped_in_a_row: how many of the latest steps were skipped, without a break.
        stale: evaluations since the best one.
        best: the score of the best evaluation; lower is better.
        best_step: how many steps were done at that evaluation.
    """

    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    stale: int = 0
    best: float | None = None
    best_step: int | None = None

    def __post_init__(self) -> None:
        counts = (self.steps, self.skipped, self.skipped_in_a_row, self.stale, self.best_step or 0)
        is_score = self.best is None or (type(self.best) is float and math.isfinite(self.best))
        if any(type(count) is not int or count < 0 for count in counts) or not is_score:
            raise ValueError(f"its progress is {asdict(self)}")


class RunFolder:
    """A run's folder while it is locked; made by :meth:`held`, or by :meth:`locked` and then :meth:`begin`.

    Attributes:
        progress: that of the checkpoint in the folder.
        history: the metrics of the steps up to the checkpoint, as far as the log has them.
    """

    def __init__(self, folder: Path, ranks: Ranks, stack: ExitStack) -> None:
        self.folder, self.ranks, self.identity = folder, ranks, Identity({})
        self.history: list[Metrics] = []
        self._stack = stack
        self._state: dict[str, Any] | None = None
        self._log: TextIO | None = None
        self._is_whole = False  # whether checkpoint.pt is known to be intact

    @classmethod
    @contextmanager
    def locked(cls, folder: str | Path, ranks: Ranks | None = None) -> Iterator[RunFolder]:
        """Lock a folder, new or with a run to resume, for one job of any number of ranks.

        Args:
            ranks: those of the job; all of them make this call.

        Raises:
            ValueError: another job has locked the folder.
        """
        with ExitStack() as stack:
            run = cls(Path(folder), ranks or Ranks(), stack)
            run.ranks.first(lambda: stack.enter_context(folder_lock(run.folder)))
            yield run

    @classmethod
    @contextmanager
    def held(
        cls,
        folder: str | Path,
        identity: Identity,
        ranks: Ranks | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Iterator[RunFolder]:
        """:meth:`locked` and :meth:`begin`; raises as they do."""
        with cls.locked(folder, ranks) as run:
            run.begin(identity, about)
            yield run

    def begin(self, identity: Identity, about: Mapping[str, Any] | None = None) -> None:
        """Resume the run in the folder, or begin one. All ranks make this call.

        Args:
            identity: what the run depends on.
            about: further facts for ``run.json``.

        Raises:
            ValueError: the run in the folder depends on something else, in which case nothing is written; or all its
                checkpoints are damaged.
        """
        self.identity = identity

        def first() -> tuple[str | None, list[Metrics]]:
            found = newest_checkpoint(self.folder)
            if found is not None:
                path, self._state = found
                advice = "Resume with what it was made with, or use another folder."
                identity.require_same(self._state["identity"], path, advice)
                self._is_whole = path.name == CHECKPOINT
            log = self.folder / METRICS
            if log.is_symlink() or (log.exists() and not log.is_file()):  # a pipe may never open
                raise ValueError(f"{log} is not a regular file, expected the log of a run")
            history = _mend(log, self.progress.steps)
            write_json(self.folder / RUN, {**(about or {}), "identity": identity.facts})
            self._log = self._stack.enter_context(log.open("a", encoding="utf-8"))
            return None if found is None else found[0].name, history

        name, self.history = self.ranks.first(first)
        if name is not None and self._state is None:
            self._state = read_checkpoint(self.folder / name)

    @property
    def progress(self) -> Progress:
        return Progress() if self._state is None else Progress(**self._state["progress"])

    def resume(
        self,
        generator: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> Progress:
        """Load the state in the folder, if there is one, into both.

        Raises:
            ValueError: the state is another module's.
        """
        progress = self.progress
        if self._state is not None:
            try:
                generator.load_state_dict(self._state["generator"])
                optimizer.load_state_dict(self._state["optimizer"])
            except Exception as error:  # whatever they raise for a state of another shape
                raise ValueError(f"{self.folder} has a checkpoint of another generator: {_line(error)}") from error
            self._state = {"progress": asdict(progress)}  # the tensors have been copied
        return progress

    def write(self, metrics: Metrics) -> None:
        """Add a step to the log."""
        if self._log is not None:
            self._log.write(json.dumps(metrics) + "\n")
            self._log.flush()

    def save(
        self,
        generator: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
    ) -> None:
        """Replace the checkpoint, and keep the previous one."""
        if self._log is None:  # only the first rank saves
            return
        os.fsync(self._log.fileno())  # after a power cut the log must not lag behind the checkpoint
        state = {
            "identity": self.identity.facts,
            "progress": asdict(progress),
            "generator": generator.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        path, previous = self.folder / CHECKPOINT, self.folder / PREVIOUS
        with replaces(path) as unfinished:
            torch.save(state, unfinished)
            if self._is_whole:
                kept = previous.with_name(f"{previous.name}.{os.getpid()}{UNFINISHED}")
                kept.unlink(missing_ok=True)
                try:
                    os.link(path, kept)  # so that both exist at every moment
                    kept.replace(previous)
                    kept.unlink(missing_ok=True)  # replace() leaves it if previous was a link to the same file
                except OSError:  # a file system without hard links
                    path.replace(previous)
        self._is_whole = True

    def save_best(self, generator: nn.Module, progress: Progress) -> None:
        """Replace the best generator."""
        if self._log is None:
            return
        state = {"identity": self.identity.facts, "progress": asdict(progress), "generator": generator.state_dict()}
        with replaces(self.folder / BEST) as unfinished:
            torch.save(state, unfinished)


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint in a folder, and its state; None if there is no checkpoint yet.

    Raises:
        ValueError: there are checkpoints, but none is intact.
    """
    path, previous = Path(folder) / CHECKPOINT, Path(folder) / PREVIOUS
    if not path.exists() and not previous.exists():
        return None
    try:
        return path, read_checkpoint(path)
    except ValueError as error:
        try:
            state = read_checkpoint(previous)
        except ValueError:
            raise error from None
        warnings.warn(f"{error}; the previous one, after {state['progress']['steps']} steps, is used", stacklevel=2)
        return previous, state


def best_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The generator in a folder that did best on held-out conditions; None if there was no evaluation.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(folder) / BEST
    return (path, read_checkpoint(path, _GENERATOR)) if path.exists() else None


def read_checkpoint(path: Path, holds: Mapping[str, type] = _HOLDS) -> dict[str, Any]:
    """A checkpoint's state, on the CPU whatever device it was made on.

    Raises:
        ValueError: no such file, or its bytes are not as they were written.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected a checkpoint of a training run")
    path.open("rb").close()  # errors raised from here on are about its contents
    try:
        with zipfile.ZipFile(path) as records:  # torch writes a CRC-32 for each record but does not check it
            if sum(record.file_size for record in records.infolist()) > path.stat().st_size:  # torch compresses none
                raise ValueError("its records are larger than the file: they are compressed, or share their bytes")
            if damaged := records.testzip():
                raise ValueError(f"the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in holds.items()):
            raise ValueError(f"it does not hold {', '.join(holds)}")
        Progress(**state["progress"])
    except Exception as error:  # zipfile and torch may raise anything on garbage
        raise ValueError(f"{path} is damaged, or not a checkpoint of a training run: {_line(error)}") from error
    return state


def _mend(path: Path, steps: int) -> list[Metrics]:
    """The log's metrics of the steps before ``steps``. Other lines are removed from the file, with a warning."""
    content = path.read_bytes() if path.is_file() else b""
    kept: dict[int, Metrics] = {}
    unreadable, later = 0, 0
    for line in content.split(b"\n"):
        metrics = _metrics(line)
        if metrics is None:
            unreadable += bool(line)
        elif metrics["step"] >= steps:
            later += 1
        else:
            kept.setdefault(int(metrics["step"]), metrics)
    history = [kept[step] for step in sorted(kept)]
    mended = "".join(json.dumps(metrics) + "\n" for metrics in history).encode()
    if mended != content:
        with replaces(path) as unfinished:
            unfinished.write_bytes(mended)
    odd = {
        f"{later} for steps after the checkpoint's {steps}, which are computed again": later,
        f"{unreadable} that cannot be read": unreadable,
        f"none for {steps - len(history)} steps before the checkpoint": steps - len(history),
    }
    if mended != content or len(history) < steps:
        found = "; ".join(words for words, count in odd.items() if count) or "some repeated or out of order"
        warnings.warn(f"{path} is repaired to match the checkpoint: among its lines are {found}", stacklevel=2)
    return history


def _metrics(line: bytes) -> Metrics | None:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int or metrics["step"] < 0:
        return None
    return metrics if all(_is_number(value) for value in metrics.values()) else None


def _is_number(value: object) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 63)


def _line(error: Exception, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
