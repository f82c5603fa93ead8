"""A run's folder: where it is made, how it is found again, and what changed since."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from diffpipe.checkpoint import best_checkpoint, damage, list_checkpoints, read_state, set_aside
from diffpipe.config.load import differences
from diffpipe.config.schema import Config
from diffpipe.durable import write_durably
from diffpipe.errors import CheckpointError, ConfigError, DiffpipeError, told_of_disk
from diffpipe.pipeline.mesh import Mesh
from diffpipe.versions import versions

CONFIG = "config.yaml"
LAUNCH = "launch.txt"  # which launch of torchrun the run belongs to


@dataclass(frozen=True)
class Run:
    """One run's folder.

    Attributes:
        folder: named by the time the run began.
        resumed: the checkpoint to go on from, None for a fresh run.
        changes: what differs between the config and versions now and those the run had.
        passed: damaged checkpoints newer than ``resumed``, and what shows it.
    """

    folder: Path
    resumed: Path | None = None
    changes: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.folder / "exports"

    @property
    def previews(self) -> Path:
        return self.folder / "previews"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def open_run(config: Config, resume: str | None, mesh: Mesh) -> Run:
    """A new run folder under ``output_dir``, or an earlier one to go on with; every rank calls this.

    A process that torchrun started again goes on with its own run, whatever ``resume`` says, once that has a checkpoint.

    Args:
        resume: None for a new run, "" for the newest that has a checkpoint, else a run's name or folder.

    Raises:
        DiffpipeError: when there is nothing to resume from, the folder cannot be written, or steps would have other samples.
    """
    launch = launched_as()
    if launch is not None:  # an agent of torchrun that took the place of another has not started its processes before
        launch = replace(launch, again=any(mesh.exchange(launch.again)))
    earlier = mesh.decide(lambda: _earlier(config, resume, launch))
    if earlier is None:
        return mesh.decide(lambda: _begin(config, launch))
    passed: list[str] = []
    newest = mesh.decide(lambda: _newest(earlier, passed))
    while found := damage(newest, mesh):
        aside = mesh.decide(partial(set_aside, newest))
        passed.append(f"{newest.name} is damaged ({found}), kept as {aside.name}")
        newest = mesh.decide(lambda: _newest(earlier, passed))
    return mesh.decide(partial(_reopen, config, earlier, newest, passed, launch))


def _earlier(config: Config, resume: str | None, launch: Launch | None) -> Path | None:
    if launch is not None and launch.again:
        for claim in _claims(config.output_dir, launch):
            if list_checkpoints(claim.parent / "checkpoints"):
                return claim.parent
    return None if resume is None else find_run(config.output_dir, resume)


def _begin(config: Config, launch: Launch | None) -> Run:
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        folder = next(f for i in range(1000) if not (f := config.output_dir / (f"{name}-{i}" if i else name)).exists())
        folder.mkdir()
        _claim(config, folder, launch)
        write_durably(folder / CONFIG, dump(config))
    except OSError as fault:
        raise DiffpipeError(
            f"the run folder cannot be made: {fault}", where="output_dir", fix="name a folder that can be written"
        ) from fault
    return Run(folder)


@dataclass(frozen=True)
class Launch:
    """What torchrun started this process for.

    Attributes:
        name: the same for all processes of one launch, however often they are started.
        again: whether they were started before.
    """

    name: str
    again: bool


def launched_as() -> Launch | None:
    """The launch of this process; None where torchrun did not start it."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name == "none":
        # One launch after another may have the port. What each of them reports is kept in a folder of its own, with one for each start.
        reports = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent.parent
        name = f"{socket.gethostname()}:{os.environ['MASTER_PORT']} {reports.name}".rstrip()
    return Launch(name, int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0)


def _claims(output_dir: Path, launch: Launch) -> list[Path]:
    return [path for path in output_dir.glob(f"*/{LAUNCH}") if path.read_text(encoding="utf-8") == launch.name]


def _claim(config: Config, folder: Path, launch: Launch | None) -> None:
    """Say which launch a run belongs to, and no other run: an earlier launch may have had the same name."""
    if launch is not None:
        for claim in _claims(config.output_dir, launch):
            claim.unlink()
        write_durably(folder / LAUNCH, launch.name.encode())


def find_run(output_dir: Path, name: str) -> Path:
    """The run folder called ``name`` (a path, or a name under ``output_dir``), or the newest when it is empty."""
    if name:
        for folder in (Path(name), output_dir / name):
            if (folder / CONFIG).is_file():
                return folder
        raise ConfigError(f"no run at {name!r}", where="--resume", expected=f"a run folder, or the name of one in {output_dir}")
    runs = _runs(output_dir)
    if not runs:
        raise ConfigError(f"no run in {output_dir} has a checkpoint", where="--resume", fix="train without --resume, or name the run")
    return runs[-1]


def config_file(run: Path) -> Path:
    """A run's config as it was resolved.

    Raises:
        ConfigError: when the folder is no run's.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} has no {CONFIG}", where="RUN", expected="a run folder, such as runs/20261123-101500")
    return run / CONFIG


def checkpoint_of(run: Path, step: int | Literal["best"] | None) -> Path:
    """A run's checkpoint.

    Args:
        step: that it was written behind; "best" takes the one with the lowest held-out loss, None the newest.

    Raises:
        ConfigError: when the folder is no run's.
        CheckpointError: when there is no such checkpoint.
    """
    config_file(run)
    if step == "best":
        return _best(run)
    found = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run / "checkpoints")}
    if not found or (step is not None and step not in found):
        raise CheckpointError(
            f"no checkpoint of step {step}" if found else "no complete checkpoint", where=str(run), expected=f"one of {sorted(found)}"
        )
    return found[max(found) if step is None else step]


def _best(run: Path) -> Path:
    found = best_checkpoint(run / "checkpoints")
    if found is None:
        raise CheckpointError(
            "no checkpoint has a held-out loss",
            where=str(run),
            expected="one that was written behind an evaluation, as with checkpoint.keep_best",
            fix="name a step with --checkpoint",
        )
    return found[0]


def _runs(output_dir: Path) -> list[Path]:
    """Runs that have a checkpoint, oldest first."""
    return [p.parent for p in sorted(output_dir.glob(f"*/{CONFIG}")) if list_checkpoints(p.parent / "checkpoints")]


def _newest(folder: Path, passed: list[str]) -> Path:
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        if passed:
            raise CheckpointError(f"no checkpoint is left: {'; '.join(passed)}", where=str(folder), fix="train without --resume")
        raise ConfigError(f"{folder} has no complete checkpoint", where="--resume", fix="train without --resume")
    return checkpoints[-1]


def _reopen(config: Config, folder: Path, checkpoint: Path, passed: list[str], launch: Launch | None) -> Run:
    state = read_state(checkpoint)
    earlier = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    if (family := earlier["model"]["family"]) != config.model.family:  # the newest run may be of another config
        raise ConfigError(
            f"{folder} trains {family}, but the config {config.model.family}", where="--resume", fix="name the run that is meant"
        )
    check_batch(config, state["data"]["group"], checkpoint)
    changes = _changes(earlier, yaml.safe_load(dump(config)))
    with told_of_disk("the run cannot go on in its folder", str(folder), "copy it to a folder that can be written, and name that one"):
        if changes:
            # The config that the run had so far is kept beside the one it goes on with.
            write_durably(folder / f"config.until-{checkpoint.name}.yaml", (folder / CONFIG).read_bytes())
        write_durably(folder / CONFIG, dump(config))
        _claim(config, folder, launch)
    changes += _changes(state["versions"], versions())
    return Run(folder, checkpoint, tuple(changes), tuple(passed))


def check_batch(config: Config, before: int, checkpoint: Path) -> None:
    """Refuse samples per step that are not those of a checkpoint, unless the config says that they may change.

    Args:
        before: samples per step of the run that wrote it.

    Raises:
        ConfigError: with the batch section that would keep them, where there is one.
    """
    batch, replicas = config.batch, config.mesh.replicas
    now = batch.micro * batch.accumulate * replicas
    if now == before or batch.may_change:
        return
    share, rest = divmod(before, batch.micro * replicas)
    keep = (
        f"set batch.accumulate to {share}"
        if not rest
        else f"take a batch.micro, mesh.replicate and mesh.shard whose product divides {before}"
    )
    raise ConfigError(
        f"{now} samples a step (micro {batch.micro} x accumulate {batch.accumulate} x mesh.replicate {config.mesh.replicate}"
        f" x mesh.shard {config.mesh.shard}),"
        f" but {checkpoint.parent.parent.name}'s {checkpoint.name} was saved with {before}",
        where="batch",
        expected=f"{before}, which give the same samples on any mesh",
        fix=f"{keep}; or set batch.may_change to true, to go on with {now} from the samples not seen yet",
    )


def dump(config: Config) -> bytes:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()


def _changes(before: Any, after: Any) -> list[str]:
    """One line for each key whose value is not the same."""
    return [f"{key} was {old!r}, now {new!r}" for key, old, new in differences(before, after)]
