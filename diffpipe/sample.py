"""Pictures and clips from a checkpoint of an earlier run, on any mesh."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from diffpipe.checkpoint import damage, load_weights
from diffpipe.config.load import load_config, validate
from diffpipe.config.schema import Config
from diffpipe.errors import CheckpointError, ConfigError, DiffpipeError
from diffpipe.metrics import Progress, Sink, Sinks
from diffpipe.models import make_model
from diffpipe.outlook import Outlook
from diffpipe.pipeline.build import build
from diffpipe.pipeline.memory.shortage import SMALLER_PREVIEWS, explained
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.pipeline.watch import Watch
from diffpipe.previews import Previews, open_prompts
from diffpipe.prompts import read_prompts
from diffpipe.run import checkpoint_of, config_file


def config_of(run: Path, overrides: Sequence[str], prompts: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> Config:
    """A run's config, for sampling; without torchrun its mesh is that of one process, unless overrides say otherwise.

    Args:
        run: its folder.
        prompts: as ``preview.prompts`` has them, in the place of those there; none leaves them.
        changes: of other keys of ``preview``.

    Raises:
        ConfigError: when the run is not there, or a value cannot be.
    """
    raw = load_config(config_file(run), overrides).begun().model_dump(mode="json")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not any(override.startswith("mesh.") for override in overrides):
        raw["mesh"] = {"timeout": raw["mesh"]["timeout"]}
    raw["preview"] |= {**({"prompts": list(prompts)} if prompts else {}), **changes}
    if not raw["preview"]["prompts"]:
        raise ConfigError("nothing says what to sample", where="--prompt", fix="name a prompt; the run has no preview.prompts")
    return validate(raw, "the run's config with these options")


def sample_run(
    run: Path,
    config: Config,
    *,
    step: int | Literal["best"] | None,
    output: Path | None,
    make_sinks: Callable[[], list[Sink]],
    tell: Callable[[DiffpipeError], None],
) -> None:
    """Write what the prompts of ``config`` become with the weights that a run had at a checkpoint.

    Args:
        run: its folder.
        config: of ``config_of``.
        step: which checkpoint; "best" takes the one with the lowest held-out loss, None the newest.
        output: the folder to write to; None is ``samples/step-N`` in the run, or ``step-N-2`` and so on where that is taken.
        make_sinks: makes what shows a person how far it is; called on one rank.
        tell: shows why this process is ended, when another is gone.

    Raises:
        DiffpipeError: on every rank, when any of them cannot be made; the others are written.
    """
    checkpoint = checkpoint_of(run, step)
    with open_mesh(config.mesh, config.model_dump(mode="json")) as mesh:
        sinks = Sinks(make_sinks() if mesh.reporter else [])
        try:
            if found := damage(checkpoint, mesh):
                raise CheckpointError(f"is damaged: {found}", where=str(checkpoint), fix="take an older checkpoint")
            model = make_model(config.model, config.objective)
            entries = mesh.decide(lambda: read_prompts(config, model))
            outlook = Outlook(config, model, mesh, entries)
            outlook.settle_samples()
            config, forecast = outlook.config, outlook.forecast
            for line in outlook.lines:
                sinks.note(line)
            for warning in outlook.warnings:
                sinks.warn(warning)
            prompts = open_prompts(config, model, mesh, sinks, entries)
            with explained(f"the weights of stage {mesh.stage}", mesh.device, SMALLER_PREVIEWS):
                pipeline = build(config, model, mesh, lambda done, total: sinks.progress(Progress("load", done, total)))
            load_weights(checkpoint, pipeline.module)
            with Watch(mesh, config.mesh.timeout, tell) as watch:
                halved = forecast.halved if forecast is not None else 0
                previews = Previews(config.preview, model, pipeline, prompts, sinks, watch, halved)
                folder = output or mesh.decide(lambda: _unused(run / "samples" / checkpoint.name))
                faults = previews.make(int(checkpoint.name.removeprefix("step-")), folder)
            mesh.decide(lambda: _complain(faults))
        finally:
            sinks.close()


def _unused(folder: Path) -> Path:
    """The folder, or the first of its name with a number behind it that is not there: earlier samples stay."""
    names = chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())


def _complain(faults: Sequence[DiffpipeError]) -> None:
    for fault in faults:
        raise fault
