"""Exports from a checkpoint of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import yaml

from diffpipe.checkpoint import list_checkpoints, read_weights
from diffpipe.config.load import validate
from diffpipe.config.schema import ExportFormat
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.export.run import export_tensors
from diffpipe.models import make_model
from diffpipe.models.adapters import plain_name
from diffpipe.models.weights import lazily
from diffpipe.run import CONFIG


def export_run(run: Path, *, formats: Sequence[str], step: int | None = None, output: Path | None = None) -> list[Path]:
    """Write the weights that a run had at a checkpoint.

    Args:
        run: its folder.
        formats: of ``ExportFormat``.
        step: which checkpoint; None takes the newest.
        output: the folder to write to; None is ``exports/step-N`` in the run.

    Raises:
        DiffpipeError: when the run or the checkpoint is not there, or a format is unknown.
    """
    unknown = [f for f in formats if f not in get_args(ExportFormat)]
    if unknown:
        raise ConfigError(f"there is no format {unknown[0]!r}", where="--format", expected=", ".join(get_args(ExportFormat)))
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} has no {CONFIG}", where="RUN", expected="a run folder, such as runs/20261123-101500")
    config = validate(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")), str(run / CONFIG))
    checkpoints = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run / "checkpoints")}
    if not checkpoints or (step is not None and step not in checkpoints):
        raise CheckpointError(
            f"no checkpoint of step {step}" if checkpoints else "no complete checkpoint",
            where=str(run),
            expected=f"one of {sorted(checkpoints)}",
        )
    chosen = max(checkpoints) if step is None else step
    weights = {plain_name(name): lazily(t.shape, t.dtype, lambda t=t: t) for name, t in read_weights(checkpoints[chosen]).items()}
    return export_tensors(
        config, make_model(config.model, config.objective), weights, output or run / "exports" / f"step-{chosen:08d}", formats
    )
