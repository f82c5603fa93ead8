"""Held-out losses, and which step had the lowest."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffpipe.checkpoint import HeldOut, best_checkpoint
from diffpipe.config.schema import Config
from diffpipe.data.dataset import Samples
from diffpipe.data.loader import eval_batches
from diffpipe.metrics import EvalRecord, Sink
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.pipeline.watch import Watch


class Evaluation:
    """The loss of held-out sets at fixed quantiles and fixed noise, the same on every rank.

    Args:
        held_out: samples by the name of their set.
        explained: tells what was done where memory ran out.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: DiffusionModel,
        held_out: Mapping[str, Samples],
        pipeline: Pipeline,
        sinks: Sink,
        watch: Watch,
        explained: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.config, self.mesh, self.model, self.held_out = config, mesh, model, held_out
        self.pipeline, self.sinks, self.watch, self.explained = pipeline, sinks, watch, explained
        self.keeps_best = config.checkpoint.keep_best
        self.measure = _measure(config, held_out)
        # How many batches later a rank asks what the others told: stages work on several at once, and would otherwise wait for each other.
        self.lag = mesh.stages if mesh.world > 1 else 0
        self.last: HeldOut | None = None
        self.best: HeldOut | None = None

    def evaluate(self, step: int, stop: Callable[[], bool] = lambda: False) -> bool:
        """Evaluate every set with the weights behind ``step``; those before the first are not the run's own, and never the best.

        Args:
            stop: whether to give it up; asked before each batch, and enough on any rank.

        Returns:
            Whether there are numbers, on all ranks; of one that was given up there are none.
        """
        records: list[EvalRecord] = []
        for name, samples in self.held_out.items():
            record = self._evaluate(step, name, samples, stop)
            if record is None:
                self.sinks.note(f"the evaluation of step {step} was given up, for the run is to end")
                return False
            records.append(record)
        if not records:
            return True
        for record in records:
            self.sinks.evaluation(record)
        self.last = HeldOut(step, sum(record.loss for record in records) / len(records), self.measure)
        if step > 0 and math.isfinite(self.last.loss) and (self.best is None or self.last.loss < self.best.loss):
            self.best = self.last
            self.tell_best()
        return True

    def is_best(self, step: int) -> bool:
        """Whether the weights behind ``step`` are to be kept as the best so far."""
        return self.keeps_best and self.best is not None and self.best.step == step

    def behind(self, step: int) -> dict[str, Any] | None:
        """The held-out loss of ``step`` as a checkpoint's state has it, where it was evaluated; none before the first."""
        return asdict(self.last) if self.last is not None and self.last.step == step > 0 else None

    def tell_best(self) -> None:
        """Tell which step is the best so far, where it is kept."""
        if self.keeps_best and self.best is not None:
            self.sinks.best(self.best.step, self.best.loss)

    def remember(self, checkpoints: Path) -> None:
        """Go on from the best checkpoint of a run; every rank calls this."""
        found = self.mesh.decide(lambda: best_checkpoint(checkpoints, self.measure))
        if found is not None:
            self.best = found[1]

    def _evaluate(self, step: int, name: str, samples: Samples, stop: Callable[[], bool]) -> EvalRecord | None:
        self.sinks.doing(f"evaluating {name}")
        told: deque[Callable[[], bool]] = deque()  # before each of the newest batches: whether any rank was to stop
        ends = False
        sums = {quantile: [0.0, 0.0] for quantile in self.config.eval.quantiles}
        for batch in eval_batches(
            samples,
            self.model,
            quantiles=self.config.eval.quantiles,
            micro=self.config.batch.micro,
            seed=self.config.run.seed,
            replica=self.mesh.replica,
            replicas=self.mesh.replicas,
            in_step=True,  # so that all tell each other equally often
            normalize_masks=self.config.data.normalize_masks,
        ):
            told.append(self.mesh.any_told(stop()))
            if len(told) > self.lag and told.popleft()():
                ends = True
                break
            if not batch.samples and self.mesh.shards == 1:
                continue  # nothing to count, and no weights that others gather with this rank
            with self.explained(f"the evaluation of bucket {batch.bucket}"):
                loss = self.pipeline.evaluate(batch.microbatches).item()
            self.watch.tick()
            quantile = batch.quantile or 0.0
            if self.mesh.stage == self.mesh.stages - 1:
                sums[quantile][0] += loss * len(batch.samples)
                sums[quantile][1] += len(batch.samples)
        for heard in told:
            heard()
        if ends:
            return None
        by_quantile = {}
        for quantile, (loss, count) in sums.items():
            loss, count = self.mesh.sum(loss, count)
            by_quantile[quantile] = loss / count
        mean = sum(by_quantile.values()) / len(by_quantile)
        return EvalRecord(step, name, mean, by_quantile)


def _measure(config: Config, held_out: Mapping[str, Samples]) -> str:
    """What held-out losses depend on beside the weights."""
    sets = {name: sorted(samples.keys()) for name, samples in held_out.items()}
    settings = [config.objective.model_dump(), config.eval.quantiles, config.run.seed, config.data.normalize_masks]
    return hashlib.blake2b(json.dumps([sets, settings]).encode(), digest_size=8).hexdigest()
