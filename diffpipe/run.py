"""A run's folder: where it is made, how it is found again, and what changed since."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from diffpipe.checkpoint import list_checkpoints, write_durably
from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError, DiffpipeError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """One run's folder.

    Attributes:
        folder: named by the time the run began.
        resumed: the checkpoint to go on from, None for a fresh run.
        changes: what differs between the config given now and the one the run had.
    """

    folder: Path
    resumed: Path | None = None
    changes: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.folder / "exports"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def open_run(config: Config, resume: str | None) -> Run:
    """A new run folder under ``output_dir``, or an earlier one to go on with.

    Args:
        resume: None for a new run, "" for the newest that has a checkpoint, else a run's name or folder.

    Raises:
        DiffpipeError: when there is nothing to resume from, or the folder cannot be written.
    """
    if resume is not None:
        return _reopen(config, find_run(config.output_dir, resume))
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        folder = next(f for i in range(1000) if not (f := config.output_dir / (f"{name}-{i}" if i else name)).exists())
        folder.mkdir()
        write_durably(folder / CONFIG, dump(config))
    except OSError as fault:
        raise DiffpipeError(
            f"the run folder cannot be made: {fault}", where="output_dir", fix="name a folder that can be written"
        ) from fault
    return Run(folder)


def find_run(output_dir: Path, name: str) -> Path:
    """The run folder called ``name`` (a path, or a name under ``output_dir``), or the newest when it is empty."""
    if name:
        for folder in (Path(name), output_dir / name):
            if (folder / CONFIG).is_file():
                return folder
        raise ConfigError(f"no run at {name!r}", where="--resume", expected=f"a run folder, or the name of one in {output_dir}")
    runs = [p.parent for p in sorted(output_dir.glob(f"*/{CONFIG}")) if list_checkpoints(p.parent / "checkpoints")]
    if not runs:
        raise ConfigError(f"no run in {output_dir} has a checkpoint", where="--resume", fix="train without --resume, or name the run")
    return runs[-1]


def _reopen(config: Config, folder: Path) -> Run:
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"{folder} has no complete checkpoint", where="--resume", fix="train without --resume")
    earlier = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    changes = differences(earlier, yaml.safe_load(dump(config)))
    if changes:
        # The config that the run had so far is kept beside the one it goes on with.
        write_durably(folder / f"config.until-{checkpoints[-1].name}.yaml", (folder / CONFIG).read_bytes())
        write_durably(folder / CONFIG, dump(config))
    return Run(folder, checkpoints[-1], tuple(changes))


def dump(config: Config) -> bytes:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """One line for each key whose value is not the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines: list[str] = []
        for name in [*before, *(n for n in after if n not in before)]:
            lines += differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
        return lines
    return [] if before == after else [f"{key} was {before!r}, now {after!r}"]
