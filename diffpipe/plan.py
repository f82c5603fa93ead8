"""What a run would do, hold and take, told before anything is read or encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffpipe.config.schema import Config, FolderBase, MeshConfig
from diffpipe.data.buckets import Bucket, make_buckets
from diffpipe.data.scan import Remembered
from diffpipe.encode import cache_folder, look, place
from diffpipe.errors import ConfigError
from diffpipe.export.run import check_formats
from diffpipe.forecast import Forecast, dims
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.optim import check_optimizer
from diffpipe.pipeline.build import check_trained, outline
from diffpipe.pipeline.cut import expand
from diffpipe.pipeline.memory.cards import Card, find_card
from diffpipe.pipeline.memory.estimate import Estimate
from diffpipe.pipeline.placement import Placer, whole
from diffpipe.pipeline.rehearsal import largest
from diffpipe.pipeline.simulate import Course
from diffpipe.pipeline.split import stage_bytes
from diffpipe.prompts import read_prompts
from diffpipe.toy import materialize


@dataclass(frozen=True)
class StagePlan:
    """One stage, and what each bucket's steps hold and take.

    Attributes:
        spans: paths of the first and the last unit of each.
        count: of units.
        share: of the model's weights.
        reasons: by key of the memory section, where it was chosen; and what previews hold.
        warnings: what a run will not do for want of memory, though it can train.
    """

    spans: tuple[tuple[str, str], ...]
    count: int
    share: float
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
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
    if config.model.path is not None or config.model.files:
        model.weights()  # else the released model is planned for, wherever it lies
        check_formats(config, model)
    check_trained(config, model)
    check_optimizer(config.optimizer, apart=config.steps_in_backward, sharded=config.shards_trained)
    chosen = find_card(card, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = read_prompts(config, model)
    buckets, scanned = buckets_of(config, model)
    placed: tuple[str, ...] = ()
    if config.mesh.stages > 1:
        limits = config.mesh.memory or [config.memory.budget or chosen.memory] * config.mesh.stages
        placement = Placer(config, model, chosen, [dims(b) for b in buckets], limits).place()
        measures = ("mesh.split: time is measured where training starts; here it is estimated",) if config.mesh.split == "time" else ()
        config, placed = config.model_copy(update={"mesh": placement.mesh}), (*measures, *placement.lines())
    module, spans = outline(config, model)
    units, sizes = expand(module, model.spec.units), stage_bytes(module, model.spec)
    stages = []
    for number in range(config.mesh.stages):
        forecast = Forecast(config, model, number, chosen, chosen.memory)
        forecast.settle(buckets)
        if prompts:
            forecast.foresee(prompts, decodes=number == config.mesh.stages - 1)
        held = spans[number :: config.mesh.stages]
        stages.append(
            StagePlan(
                spans=tuple((units[start], units[stop - 1]) for start, stop in held),
                count=sum(stop - start for start, stop in held),
                share=sum(sum(sizes[start:stop]) for start, stop in held) / sum(sizes),
                reasons=tuple(forecast.lines()),
                warnings=tuple(forecast.warnings()),
                buckets={bucket: forecast.of(bucket) for bucket in buckets},
            )
        )
    count, trained = (sum(p.numel() for p in module.parameters() if p.requires_grad or every) for every in (True, False))
    return Plan((*_lines(config, model, count, trained), *placed), chosen, scanned, tuple(stages))


@dataclass(frozen=True)
class Scaled:
    """A mesh of a number of devices, and what a step of the largest bucket would be on it.

    Attributes:
        samples: of a step; as many microbatches for each replica as the config has.
        seconds: of a step, with the exchange of gradients behind its passes.
        course: of the passes.
        sent: bytes that the busiest stage sends to its neighbours.
        reduced: bytes that a rank sends to replicas.
        held: bytes, the most of all stages.
    """

    mesh: MeshConfig
    samples: int
    seconds: float
    course: Course
    sent: int
    reduced: int
    held: int


def scale(config: Config, devices: int, card: str | None = None) -> tuple[Card, list[Scaled]]:
    """What each mesh of so many devices would make of a config, simulated pass by pass; the fastest first.

    ``mesh.shard`` stays as it is, and ``mesh.split`` and ``mesh.schedule`` are chosen anew for each.

    Raises:
        DiffpipeError: when no mesh has so many devices.
    """
    config = materialize(config)
    model = make_model(config.model, config.objective)
    chosen = find_card(card, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    buckets = [dims(b) for b in buckets_of(config, model)[0]]
    units = whole(config, model, chosen).inventory(largest(buckets))
    trained = sum(p.nbytes for p in outline(config, model)[0].parameters() if p.requires_grad)
    found: list[Scaled] = []
    for stages in (n for n in range(1, len(units) + 1) if devices % (n * config.mesh.shard) == 0):
        sizes = {"stages": stages, "replicate": devices // stages // config.mesh.shard, "memory": None, "spans": None, "split": "auto"}
        schedule = config.mesh.schedule if config.mesh.schedule not in ("eager-1f1b", "interleaved") else "auto"
        mesh = config.mesh.model_copy(update={**sizes, "schedule": schedule})
        placement = Placer(config.model_copy(update={"mesh": mesh}), model, chosen, buckets, units=units).place()
        reduced = int(2 * (mesh.replicas - 1) / mesh.replicas * trained / stages)
        found.append(
            Scaled(
                mesh=placement.mesh,
                samples=config.batch.micro * config.batch.accumulate * mesh.replicas,
                seconds=placement.course.seconds + reduced / chosen.link,
                course=placement.course,
                sent=max(placement.sent),
                reduced=reduced,
                held=max(placement.held),
            )
        )
    if not found:
        raise ConfigError(
            f"no mesh of shard {config.mesh.shard} and 1 to {len(units)} stages has {devices} devices",
            where="--devices",
            expected=f"a multiple of {config.mesh.shard}",
        )
    return chosen, sorted(found, key=lambda each: each.seconds / each.samples)


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
    processes = mesh.stages * mesh.replicas
    ends = " or ".join(f"{n} {w}" for n, w in ((config.run.steps, "steps"), (config.run.epochs, "epochs")) if n)
    return (
        f"{model.title}: {count / 1e9:.3f} B parameters, {trained / 1e6:.2f} M of them trained in {config.model.trainable_dtype}",
        f"{processes} process{'' if processes == 1 else 'es'}: {mesh.stages} stages x {mesh.replicate} replicas x {mesh.shard} shards",
        f"{batch.micro * batch.accumulate * mesh.replicas} samples a step: "
        f"micro {batch.micro} x accumulate {batch.accumulate} x replicate {mesh.replicate} x shard {mesh.shard}",
        f"ends after {ends}",
    )
