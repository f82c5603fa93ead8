"""Act two: the cache becomes steps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from diffpipe.checkpoint import Checkpoints, load, read_state
from diffpipe.config.schema import CheckpointConfig, Config, EvalConfig, ExportConfig, MemoryConfig, PreviewConfig
from diffpipe.data.buckets import Bucket
from diffpipe.data.cache import Cache
from diffpipe.data.dataset import Samples
from diffpipe.data.feed import Feed
from diffpipe.data.loader import Batch, make_loader
from diffpipe.data.sampler import StepSampler
from diffpipe.data.workers import told_of_death
from diffpipe.description import describe
from diffpipe.encode import cache_folder, prepare_data
from diffpipe.errors import DiffpipeError, ShortageError, Stopped
from diffpipe.evaluation import Evaluation
from diffpipe.export.run import check_formats, export_weights
from diffpipe.forecast import Comparison, Forecast
from diffpipe.guard import Guard
from diffpipe.meter import Meter
from diffpipe.metrics import Progress, Sink, Sinks, StepRecord, TextSink
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.optim import caution, check_optimizer, factor, make_optimizer, rate_of, set_rates
from diffpipe.outlook import Outlook
from diffpipe.pipeline.attention import check_attention
from diffpipe.pipeline.build import build, check_trained
from diffpipe.pipeline.memory.shortage import explained, remedies
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.replay import check_captured, spare_workspace
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.pipeline.shard import local
from diffpipe.pipeline.watch import Watch
from diffpipe.previews import Previews, open_prompts
from diffpipe.prompts import Prompts, read_prompts
from diffpipe.requests import NOTHING, Request, Requests, Signals
from diffpipe.run import Run, open_run
from diffpipe.startup import Startup
from diffpipe.toy import materialize
from diffpipe.trackers import TensorBoardSink, WandbSink, check_wandb
from diffpipe.versions import versions
from diffpipe.wishes import Wishes, forget

MakeSinks = Callable[[], list[Sink]]
Tell = Callable[[DiffpipeError], None]


def print_fault(fault: DiffpipeError) -> None:
    """Tell of a fault that no exception can bring to whoever called, since its process is ended."""
    print(fault, file=sys.stderr, flush=True)


def train(config: Config, *, resume: str | None, make_sinks: MakeSinks, tell: Tell = print_fault) -> Path:
    """Train as ``config`` says, in a new run folder or on from a checkpoint.

    Args:
        resume: None for a new run, "" for the newest run, else a run's name or folder.
        make_sinks: makes what shows the run to a person; called on the one rank that speaks for it.
        tell: shows why this process is ended, when another rank is gone or hangs and this one may wait for it for ever.

    Returns:
        The run folder.

    Raises:
        DiffpipeError: for whatever the user can cure.
        Stopped: when a signal asked the run to stop before its last step.
    """
    startup = Startup()
    startup.lap("imports")
    config = materialize(config)
    startup.lap("toys")
    with open_mesh(config.mesh, {**config.model_dump(mode="json"), "versions": versions()}) as mesh:
        startup.lap("processes")
        return train_on(mesh, config, startup, resume=resume, make_sinks=make_sinks, tell=tell)


def train_on(mesh: Mesh, config: Config, startup: Startup, *, resume: str | None, make_sinks: MakeSinks, tell: Tell) -> Path:
    """``train`` by processes that have met; toys are made already."""
    mesh.decide(lambda: check_wandb(config.metrics.wandb))
    run = open_run(config, resume, mesh)
    config = config.begun() if run.resumed is not None else config
    sinks = open_sinks(run, config, mesh, make_sinks)
    startup.lap("run folder")
    try:
        model = make_model(config.model, config.objective)
        model.weights()
        check_formats(config, model)
        check_trained(config, model)
        check_attention(config.model.attention, mesh.device)
        check_captured(config.memory.cuda_graphs, model, mesh.device)
        if config.memory.cuda_graphs:
            spare_workspace()
        check_optimizer(config.optimizer, apart=config.steps_in_backward, sharded=config.shards_trained)
        if told := caution(config.optimizer, config.mesh.stages):
            sinks.warn(told)
        asked = mesh.decide(lambda: read_prompts(config, model))
        outlook = Outlook(config, model, mesh, asked)
        startup.lap("plan")
        samples, held_out = open_data(config, model, mesh, sinks, outlook=outlook, lap=startup.lap)
        prompts = open_prompts(config, model, mesh, sinks, asked)
        startup.lap("encode")
        config, forecast = outlook.config, outlook.forecast
        for line in outlook.lines:
            sinks.note(line)
        torch.manual_seed((config.run.seed + mesh.rank) % 2**64)
        with explained(f"the weights of stage {mesh.stage}", mesh.device, remedies(config)):
            pipeline = build(config, model, mesh, lambda done, total: sinks.progress(Progress("load", done, total)), startup.lap)
        Trainer(config, mesh, run, sinks, model, samples, held_out, prompts, pipeline, forecast, tell, startup).train()
    except (DiffpipeError, Stopped) as fault:
        if mesh.reporter:
            Sinks([TextSink.to_file(run.log)]).note(str(fault))  # the person is told by the command line
        raise
    finally:
        sinks.close()
    return run.folder


def cache(config: Config, *, make_sinks: MakeSinks, verify: bool = False, rebuild: bool = False, prune: bool = False) -> None:
    """Act one alone: encode what the config's folders hold and the cache lacks, and report it.

    Args:
        verify: compare every shard with its hash first, and remove those that differ.
        rebuild: encode what the cache holds too.
        prune: remove afterwards what this config does not use.

    Raises:
        DiffpipeError: for whatever the user can cure.
    """
    config = materialize(config)
    with open_mesh(config.mesh) as mesh:
        sinks = Sinks(make_sinks() if mesh.reporter else [])
        try:
            folder = cache_folder(config)
            if verify:
                for path in mesh.decide(lambda: Cache(folder).verify()):
                    sinks.note(f"damaged, removed: {path}")
            model = make_model(config.model, config.objective)
            asked = mesh.decide(lambda: read_prompts(config, model))
            samples, held_out = open_data(config, model, mesh, sinks, again=rebuild)
            prompts = open_prompts(config, model, mesh, sinks, asked)
            if prune:
                used = set().union(*(s.keys() for s in (samples, *held_out.values(), prompts)))
                freed = mesh.decide(lambda: Cache(folder).prune(used))
                sinks.note(f"removed {freed / (1 << 20):.1f} MiB that this config does not use from {folder}")
        finally:
            sinks.close()


def open_sinks(run: Run, config: Config, mesh: Mesh, make_sinks: MakeSinks) -> Sinks:
    """Everything that records the run, on the rank that speaks for it; nothing on the others."""
    opened: list[Sink] = []
    wandb = config.metrics.wandb
    mesh.decide(lambda: opened.extend([WandbSink(wandb, run.folder)] if wandb else []))  # which may fail: then all ranks do
    if not mesh.reporter:
        return Sinks([])
    resumed_at = read_state(run.resumed)["step"] if run.resumed else None
    sinks = Sinks([TensorBoardSink(run.tensorboard, resumed_at), TextSink.to_file(run.log), *opened, *make_sinks()])
    sinks.note(f"run folder {run.folder}")
    for damaged in run.passed:
        sinks.note(damaged)
    if run.resumed is not None:
        sinks.note(f"resumed from {run.resumed.name}")
    for line in forget(run.folder):
        sinks.note(line)
    for change in run.changes:
        sinks.note(f"changed since the run began: {change}")
    return sinks


def open_data(
    config: Config,
    model: DiffusionModel,
    mesh: Mesh,
    sinks: Sinks,
    again: bool = False,
    outlook: Outlook | None = None,
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[Samples, dict[str, Samples]]:
    """The training samples and the held-out ones by name, encoded first where the cache lacks them.

    Args:
        outlook: settled by the buckets that train, before anything is encoded.
        lap: told the name of each phase when it is over.
    """
    opened: list[Samples] = []
    for name, folders in [("train", config.data.folders), *((s.name, s.folders) for s in config.eval.sets)]:
        samples, report = prepare_data(
            config,
            model,
            folders,
            rank=mesh.rank,
            world=mesh.world,
            exchange=mesh.exchange,
            device=mesh.device,
            progress=sinks.progress,
            again=again,
            lap=lap,
            **({"fits": partial(_settle, outlook, sinks)} if outlook is not None and name == "train" else {}),
        )
        for line in report.lines():
            sinks.note(f"{name}: {line}")
        opened.append(samples)
    return opened[0], {s.name: held_out for s, held_out in zip(config.eval.sets, opened[1:], strict=True)}


def _settle(outlook: Outlook, sinks: Sinks, buckets: Collection[Bucket]) -> None:
    outlook.settle(buckets)
    for warning in outlook.warnings:
        sinks.warn(warning)


class Trainer:
    """One run's loop: batches to steps, with evaluation, checkpoints and exports in between."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        run: Run,
        sinks: Sinks,
        model: DiffusionModel,
        samples: Samples,
        held_out: dict[str, Samples],
        prompts: Prompts,
        pipeline: Pipeline,
        forecast: Forecast | None,
        tell: Tell,
        startup: Startup,
    ) -> None:
        self.config, self.mesh, self.run, self.sinks, self.model, self.pipeline = config, mesh, run, sinks, model, pipeline
        self.forecast, self.startup = forecast, startup
        self.queued = False  # whether it was told that steps are, which should be replayed
        self.module: nn.Module = pipeline.module
        self.optimizer: Optimizer = make_optimizer(config.optimizer, pipeline.trained.items())
        self.release = pipeline.memory.release_with(self.optimizer, mesh.mean_over_replicas)
        micro, seed = config.batch.micro, config.run.seed
        sampler = StepSampler(
            samples.buckets,
            samples.repeats,
            micro=micro,
            accumulate=config.batch.accumulate,
            seed=seed,
            replica=mesh.replica,
            replicas=mesh.replicas,
        )
        self.comparison = Comparison(forecast) if forecast is not None and mesh.device.type == "cuda" else None
        self.guard = Guard(config.optimizer, mesh, [str(entry.file) for entry in samples.entries])
        self.watch = Watch(mesh, config.mesh.timeout, tell)
        halved = forecast.halved if forecast is not None else 0
        self.previews = Previews(config.preview, model, pipeline, prompts, sinks, self.watch, halved) if len(prompts) else None
        self.step = 0
        self.evaluation = Evaluation(config, mesh, model, held_out, pipeline, sinks, self.watch, self._explained)
        self.checkpoints = Checkpoints(run.checkpoints, mesh, config.checkpoint, config.memory.pin and mesh.device.type == "cuda")
        self.saved_at = time.monotonic()
        self.owing: int | None = None  # where an evaluation is still to be made: the epochs that were over before its step
        self.resumed_at: int | None = None
        if run.resumed is not None:
            rule = config.optimizer.rule
            state = load(run.resumed, self.module, self.optimizer, rule, mesh, self.release.waits_on_host())
            if (earlier := state.get("rule", rule)) != rule:
                sinks.warn(f"the state of the optimizer begins anew, for the checkpoint has that of {earlier}, not of {rule}")
            self.step = self.resumed_at = state["step"]
            self.owing = state.get("owing")
            self.guard.skipped, self.guard.in_a_row = state["skipped"]
            if state.get("cudnn_given_up"):
                pipeline.attention.retreat()  # a resumed run goes on as the unbroken one would
            if note := sampler.load_state_dict(state["data"]):
                sinks.warn(note)
            self.evaluation.remember(run.checkpoints)
        # Before workers draw from it.
        self.total, self.epochs = total_steps(config, sampler, self.step), sampler.epochs_over
        loader = make_loader(
            samples,
            sampler,
            model,
            micro=micro,
            seed=seed,
            workers=config.data.workers,
            normalize_masks=config.data.normalize_masks,
            pinned=mesh.device.type == "cuda",
        )
        self.feed = Feed(loader, mesh.device)
        self.meter = Meter(mesh, pipeline, self.total)

    def train(self) -> None:
        """Run to the last step, or until asked to stop."""
        wishes = Wishes(self.run.folder, self.sinks.note, self.sinks.warn)
        with self.watch, Signals(self.sinks.note) as signals:
            self.sinks.begin(describe(self.config, self.model, self.run, self.mesh), wishes.ask)
            own = self.mesh.reporter

            def stopping() -> bool:
                return signals.stopping.is_set() or (own and wishes.ends())

            sources = [signals.take, self._asked_by_the_clock, self._asked_by_the_disk, *([wishes.take] if own else [])]
            try:
                self._train(Requests(self.mesh, sources), stopping)
            finally:
                self.feed.close()

    def _train(self, requests: Requests, stopping: Callable[[], bool]) -> None:
        self.startup.lap("setup")
        if self.run.resumed:
            self.evaluation.tell_best()
            if self.step >= self.total and self.owing is None:
                self.sinks.note(f"nothing is left to train behind step {self.step}: raise run.steps or run.epochs")
        ends = False
        if self.step == 0 or self.owing is not None:
            ends = self._behind(self.epochs if self.owing is None else self.owing, requests, stopping)
            self.startup.lap("evaluation")
        while not ends and self.step < self.total:
            with told_of_death("data.workers"):
                record = self.take_step(requests)
            if (started := self.startup.ended(self.mesh)) is not None:
                self.sinks.started(started)
            if self.step % self.config.metrics.every_steps == 0 or self.step == self.total:
                self.sinks.step(record)
            before, self.epochs = self.epochs, record.epoch + record.epoch_ends
            ends = self._behind(before, requests, stopping)

    def _behind(self, before: int, requests: Requests, stopping: Callable[[], bool]) -> bool:
        """Do what is due behind a step, or before the first, and what was asked for.

        Where the evaluation is given up, the run ends with a checkpoint that says so, and all that is due is left to the run that goes on.

        Args:
            before: the epochs that were over before the step.
            stopping: whether this rank is asked to end the run.

        Returns:
            Whether the run ends here.

        Raises:
            Stopped: when a signal asked for it.
        """
        config, first, last = self.config, self.step == 0, self.step == self.total
        due = partial(is_due, (max(self.step - 1, 0), self.step), (before, self.epochs))
        self.owing = None
        if (first and config.eval.at_start) or last or due(config.eval):
            if not self.evaluation.evaluate(self.step, stopping):
                self.owing = before
            requests.listen()
        asked = requests.agreed()
        if Request.WAIT not in asked:
            self._finish_saving()
        if Request.EXPORT in asked or (self.owing is None and (last or due(config.export))):
            self.export()
        # Behind the export: a run that is killed in between makes it again.
        saves = last or self.evaluation.is_best(self.step) or bool(asked & (Request.CHECKPOINT | Request.STOP))
        if saves or self.step == self.resumed_at or due(config.checkpoint):
            self.save()
        ends = bool(asked & (Request.STOP | Request.QUIT))
        # Behind the checkpoint, for they may take longer than a machine is left to a run.
        previews = not ends and (last or due(config.preview) or (first and config.preview.at_start))
        if previews or Request.PREVIEW in asked:
            self._finish_saving()  # which gives the checkpoint its name
            self.preview(stopping, asked=Request.PREVIEW in asked)
        if last or ends:
            self._finish_saving()
        if ends and (not last or self.owing is not None):
            if Request.INTERRUPT in asked:
                raise Stopped(self.run.folder, self.step)
            goes_on = "; --resume goes on from there" if Request.STOP in asked else ""
            self.sinks.note(f"ended behind step {self.step} of {self.total}, as asked{goes_on}")
        return ends

    def take_step(self, requests: Requests) -> StepRecord:
        """Wait for a batch, run it, move the weights.

        Beside what the passes and the averaging of gradients take, ranks wait for each other twice: before the weights move, for the loss
        and the norm, and behind, for all else that they have to tell. Each is a round trip in which devices are idle.
        """
        self.meter.begin()
        batch = next(self.feed)
        self.meter.lap("data", on_device=False)
        self.sinks.doing(f"step {self.step + 1}, bucket {batch.bucket}")
        if self.step + 1 < self.total:
            self.feed.fetch_ahead()
        set_rates(self.optimizer, factor(self.config.schedule, self.step + 1, self.total))
        gradients, norm, (loss, grad_norm) = self._add_up(self._pass(batch))
        if not math.isfinite(grad_norm) and self.pipeline.attention.retreat():
            self.sinks.warn(f"step {self.step + 1}: the gradient was not finite; repeated, and going on, without cuDNN's attention")
            self.optimizer.zero_grad(set_to_none=True)
            gradients, norm, (loss, grad_norm) = self._add_up(self._pass(batch))
        moves = self._may_move(loss, grad_norm, batch)
        if moves and self.config.optimizer.clip is not None:
            scale = (self.config.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(g) for g in gradients], scale) if gradients else None
        self.meter.lap("communication")
        if moves:
            self.release.step_rest()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        self.meter.lap("optimizer")
        self.step += 1
        self.watch.tick()
        lr = rate_of(self.optimizer)
        told = self.mesh.gather([requests.own(), *self.meter.measured(batch)])
        requests.hear(row[0] for row in told)
        record = self.meter.record(self.step, batch, [row[1:] for row in told], loss, grad_norm, lr, self.guard.skipped)
        if self.comparison is not None and self.comparison.due(batch.bucket):
            lines = self.mesh.exchange(self.comparison.line(batch.bucket, self.meter.held))
            self.sinks.note(f"bucket {batch.bucket}: {'; '.join(lines[:: self.mesh.replicas])}")
        return record

    def _may_move(self, loss: float, norm: float, batch: Batch) -> bool:
        """Whether the step may move the weights; the run may end here instead, with its last checkpoint complete."""
        try:
            skipped = self.guard.judge(self.step + 1, loss, norm, batch, self.pipeline.shares)
        except DiffpipeError:
            self._finish_saving()
            raise
        if skipped is not None:
            self.sinks.note(skipped)
        return skipped is None

    def _pass(self, batch: Batch) -> torch.Tensor:
        """Both passes of a step; once more by settings that hold less, where memory runs out and the config says so."""
        while True:
            try:
                with self._explained(f"step {self.step + 1} of bucket {batch.bucket}"):
                    share = self.pipeline.train(batch.microbatches)
                self.meter.lap("passes")
                self._tell_queued()
                return share
            except ShortageError as fault:
                settings = self._lower(batch)
                if settings is None:
                    raise
                self.sinks.warn(f"{fault.found}; repeated with memory {settings.model_dump(mode='json', exclude_defaults=True)}")
            self.optimizer.zero_grad(set_to_none=True)
            self.pipeline.change_memory(settings)
            torch.cuda.empty_cache()

    def _tell_queued(self) -> None:
        """Warn, once, where steps that should be replayed are not."""
        told = None if self.queued or self.pipeline.replays is None else self.pipeline.replays.kinds.complaint()
        if told is not None:
            self.queued = True
            self.sinks.warn(told)

    def _lower(self, batch: Batch) -> MemoryConfig | None:
        if self.forecast is None or self.config.memory.on_oom != "adapt":
            return None
        settings = self.forecast.lower(batch.bucket)
        self.config = self.forecast.config
        return settings

    def _add_up(self, share: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, list[float]]:
        """This rank's gradients, averaged over the replicas; the norm of all, those that were released with their units' too; and the loss
        of the whole step with that norm, as numbers, for which the device is waited for once."""
        gradients, counted = self.pipeline.gradients()
        loss, norm = self.mesh.loss_and_norm(share, counted, self.release.square())
        return gradients, norm, torch.stack([loss, norm.double()]).tolist()

    def _explained(self, doing: str) -> AbstractContextManager[None]:
        return explained(f"{doing} on stage {self.mesh.stage}", self.mesh.device, remedies(self.config))

    def save(self) -> None:
        """Begin to write a checkpoint, and wait for it where it is not written in the background. Where the run has gone on from one of the
        same step, that is told what is known now."""
        self.sinks.doing("writing a checkpoint")
        self._finish_saving()
        found = {"held_out": self.evaluation.behind(self.step), "owing": self.owing}
        if self.run.resumed is not None and self.step == self.resumed_at:
            self.checkpoints.amend(self.run.resumed, found)
            return
        self.pipeline.memory.settle()
        state = {
            "data": self.feed.state_dict(),
            "total": self.total,
            "rule": self.config.optimizer.rule,
            "cudnn_given_up": self.pipeline.attention.retreated,
            "skipped": [self.guard.skipped, self.guard.in_a_row],
            "versions": versions(),
            **found,
        }
        self.checkpoints.save(self.step, self.module, self.optimizer, state)
        self.saved_at = time.monotonic()
        if not self.config.checkpoint.background:
            self._finish_saving()

    def _finish_saving(self) -> None:
        with self.watch.patient():
            saved = self.checkpoints.finish()
        if saved is not None:
            self.sinks.note(f"training stood still {saved.stalled:.3f} s for a checkpoint")
            self.sinks.written("checkpoint", saved.path)

    def export(self) -> None:
        """Write the trained weights in every format that is asked for."""
        self.sinks.doing("exporting")
        self.pipeline.memory.settle()
        folder = self.run.exports / f"step-{self.step:08d}"
        with self.watch.patient():
            paths = export_weights(self.config, self.model, self.module, self.mesh, folder, self.config.export.formats)
        for path in paths:
            self.sinks.written("export", path)

    def preview(self, stopping: Callable[[], bool], asked: bool = False) -> None:
        """Sample the prompts with the weights as they are.

        Args:
            stopping: whether a signal asks the run to stop, which must not wait for all of them.
            asked: whether a person asked for it, who is told where there are no prompts.
        """
        if self.previews is not None:
            self.sinks.doing("sampling previews")
            self.previews.make(self.step, self.run.previews / f"step-{self.step:08d}", stopping)
        elif asked:
            self.sinks.note("no preview is made, for preview.prompts is empty")

    def _asked_by_the_clock(self) -> Request:
        """Whether a checkpoint is due by the clock of this rank; the first whose minutes are up asks for all."""
        minutes = self.config.checkpoint.every_minutes
        return Request.CHECKPOINT if minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes else NOTHING

    def _asked_by_the_disk(self) -> Request:
        return Request.WAIT if self.checkpoints.is_writing() else NOTHING


def total_steps(config: Config, sampler: StepSampler, step: int) -> int:
    """The step that the run ends with: the first of ``run.steps`` and the end of ``run.epochs``.

    Args:
        sampler: at its place behind ``step``.
    """
    ends = [config.run.steps, step + sampler.steps_until(config.run.epochs) if config.run.epochs else None]
    total = min(end for end in ends if end is not None)
    if total == 0:
        raise DiffpipeError(
            f"{config.run.epochs} epochs of the samples fill no batch",
            where="run.epochs",
            expected="at least one bucket with batch.micro x batch.accumulate x mesh.replicate x mesh.shard samples",
            fix="lower batch.accumulate or batch.micro, or set run.steps",
        )
    return total


def is_due(steps: tuple[int, int], epochs: tuple[int, int], section: EvalConfig | ExportConfig | CheckpointConfig | PreviewConfig) -> bool:
    """Whether what a section says is due behind a step.

    Args:
        steps, epochs: how many were over before it, and are now; several epochs may have passed without a step.
    """
    counts = ((steps, section.every_steps), (epochs, section.every_epochs))
    return any(every is not None and now // every > before // every for (before, now), every in counts)
