"""What a run would do, hold and take, told before anything is read or encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffpipe.config.schema import Config, FolderBase
from diffpipe.data.buckets import Bucket, make_buckets
from diffpipe.data.scan import Remembered
from diffpipe.encode import cache_folder, look, place
from diffpipe.export.run import check_formats
from diffpipe.forecast import Forecast
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.optim import check_optimizer
from diffpipe.pipeline.build import outline
from diffpipe.pipeline.cut import expand
from diffpipe.pipeline.memory.cards import Card, find_card
from diffpipe.pipeline.memory.estimate import Estimate
from diffpipe.pipeline.split import stage_bytes
from diffpipe.toy import materialize


@dataclass(frozen=True)
class StagePlan:
    """One stage, and what each bucket's steps hold and take.

    Attributes:
        units: paths of the first and the last.
        count: of units.
        share: of the model's weights.
        reasons: by key of the memory section, where it was chosen.
    """

    units: tuple[str, str]
    count: int
    share: float
    reasons: tuple[str, ...]
    buckets: dict[Bucket, Estimate]


@dataclass(frozen=True)
class Plan:
    """A run before it is one.

    Attributes:
        lines: what trains, on how many processes, in which batches.
        scanned: whether the buckets are those of the data; else they are all that the config allows.
    """

    lines: tuple[str, ...]
    card: Card
    scanned: bool
    stages: tuple[StagePlan, ...]


def make_plan(config: Config, card: str | None = None) -> Plan:
    """The plan of a config.

    Args:
        card: name of the card to plan for; None takes the one that there is, or a usual one.

    Raises:
        DiffpipeError: for what would stop the run before its first step and needs no encoding to find out.
    """
    config = materialize(config)
    model = make_model(config.model, config.objective)
    whole, spans = outline(config, model)
    if config.model.path is not None or config.model.files:
        model.weights()  # else the released model is planned for, wherever it lies
        check_formats(config, model)
    check_optimizer(config.optimizer, apart=config.steps_in_backward, sharded=config.shards_trained)
    chosen = find_card(card, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    buckets, scanned = buckets_of(config, model)
    units, sizes = expand(whole, model.spec.units), stage_bytes(whole, model.spec)
    stages = []
    for number, (start, stop) in enumerate(spans):
        forecast = Forecast(config, model, number, chosen, chosen.memory)
        forecast.settle(buckets)
        stages.append(
            StagePlan(
                units=(units[start], units[stop - 1]),
                count=stop - start,
                share=sum(sizes[start:stop]) / sum(sizes),
                reasons=tuple(forecast.lines()),
                buckets={bucket: forecast.of(bucket) for bucket in buckets},
            )
        )
    count, trained = (sum(p.numel() for p in whole.parameters() if p.requires_grad or every) for every in (True, False))
    return Plan(_lines(config, model, count, trained), chosen, scanned, tuple(stages))


def buckets_of(config: Config, model: DiffusionModel) -> tuple[list[Bucket], bool]:
    """The buckets of the data, where it is there; else all that the config allows, and False."""
    folders: Sequence[FolderBase] = config.data.folders
    if all(Path(f.path).exists() for f in folders):
        memory = Remembered(cache_folder(config) / "files.json")
        found = look(config, model, folders, memory)
        memory.save(found.clips)
        samples, _ = place(found.clips, config, model, folders)
        if samples:
            return sorted({s.bucket for s in samples}), True
    allowed = {
        Bucket(frames, *size)
        for folder in folders
        for sizes in make_buckets(config.data.of(folder), model.geometry).groups
        for size, counts in sizes.items()
        for frames in (counts if model.geometry.fps and counts else (1,))
    }
    return sorted(allowed), False


def _lines(config: Config, model: DiffusionModel, count: int, trained: int) -> tuple[str, ...]:
    mesh, batch = config.mesh, config.batch
    ends = " or ".join(f"{n} {w}" for n, w in ((config.run.steps, "steps"), (config.run.epochs, "epochs")) if n)
    return (
        f"{model.title}: {count / 1e9:.3f} B parameters, {trained / 1e6:.2f} M of them trained in {config.model.trainable_dtype}",
        f"{mesh.stages * mesh.replicas} processes: {mesh.stages} stages x {mesh.replicate} replicas x {mesh.shard} shards",
        f"{batch.micro * batch.accumulate * mesh.replicas} samples a step: "
        f"micro {batch.micro} x accumulate {batch.accumulate} x replicate {mesh.replicate} x shard {mesh.shard}",
        f"ends after {ends}",
    )
