"""A run's metrics in TensorBoard and in Weights & Biases, if these are installed and requested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoints import Metrics
from .fields import check_fields


@dataclass(frozen=True)
class TrackerOptions:
    """Where the metrics of a run go in addition to ``metrics.jsonl``.

    Attributes:
        tensorboard: whether to write a TensorBoard log in the run's folder.
        wandb: a Weights & Biases project to log to, as one run, however often it is resumed.
    """

    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


class Trackers:
    """Open trackers, for one process.

    Args:
        folder: the run's folder.
        facts: what the run depends on.
        run_id: the same each time the run is resumed.

    Raises:
        ValueError: a tracker that is requested but not installed.
    """

    def __init__(self, options: TrackerOptions, folder: Path, facts: Mapping[str, Any], run_id: str) -> None:
        self._writer: Any = None
        self._run: Any = None
        if options.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"log.tensorboard needs the package tensorboard: {error}") from error
            self._writer = SummaryWriter(str(folder / "tensorboard"))
        if options.wandb is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(f"log.wandb needs the package wandb: {error}") from error
            self._run = wandb.init(
                project=options.wandb, id=run_id, name=folder.name, dir=str(folder), config=dict(facts), resume="allow"
            )

    def write(self, metrics: Metrics) -> None:
        """Log a step."""
        step = int(metrics["step"])
        values = {name: value for name, value in metrics.items() if name != "step"}
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)
