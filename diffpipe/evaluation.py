"""Held-out losses, and which step had the lowest."""

from __future__ import annotations

import hashlib
import json
import math
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
        self.last: HeldOut | None = None
        self.best: HeldOut | None = None

    def evaluate(self, step: int) -> None:
        """Evaluate every set with the weights behind ``step``; those before the first are not the run's own, and never the best."""
        losses = [self._evaluate(step, name, samples) for name, samples in self.held_out.items()]
        if not losses:
            return
        self.last = HeldOut(step, sum(losses) / len(losses), self.measure)
        if step > 0 and math.isfinite(self.last.loss) and (self.best is None or self.last.loss < self.best.loss):
            self.best = self.last
            self.tell_best()

    def is_best(self, step: int) -> bool:
        """Whether the weights behind ``step`` are to be kept as the best so far."""
        return self.keeps_best and self.best is not None and self.best.step == step

    def behind(self, step: int) -> dict[str, Any] | None:
        """The held-out loss of ``step`` as a checkpoint's state has it, where it was evaluated."""
        return asdict(self.last) if self.last is not None and self.last.step == step else None

    def tell_best(self) -> None:
        """Tell which step is the best so far, where it is kept."""
        if self.keeps_best and self.best is not None:
            self.sinks.best(self.best.step, self.best.loss)

    def remember(self, checkpoints: Path) -> None:
        """Go on from the best checkpoint of a run; every rank calls this."""
        found = self.mesh.decide(lambda: best_checkpoint(checkpoints, self.measure))
        if found is not None:
            self.best = found[1]

    def _evaluate(self, step: int, name: str, samples: Samples) -> float:
        self.sinks.doing(f"evaluating {name}")
        sums = {quantile: [0.0, 0.0] for quantile in self.config.eval.quantiles}
        for batch in eval_batches(
            samples,
            self.model,
            quantiles=self.config.eval.quantiles,
            micro=self.config.batch.micro,
            seed=self.config.run.seed,
            replica=self.mesh.replica,
            replicas=self.mesh.replicas,
            in_step=self.mesh.shards > 1,  # which gather weights together
            normalize_masks=self.config.data.normalize_masks,
        ):
            with self.explained(f"the evaluation of bucket {batch.bucket}"):
                loss = self.pipeline.evaluate(batch.microbatches).item()
            self.watch.tick()
            quantile = batch.quantile or 0.0
            if self.mesh.stage == self.mesh.stages - 1:
                sums[quantile][0] += loss * len(batch.samples)
                sums[quantile][1] += len(batch.samples)
        by_quantile = {}
        for quantile, (loss, count) in sums.items():
            loss, count = self.mesh.sum(loss, count)
            by_quantile[quantile] = loss / count
        mean = sum(by_quantile.values()) / len(by_quantile)
        self.sinks.evaluation(EvalRecord(step, name, mean, by_quantile))
        return mean


def _measure(config: Config, held_out: Mapping[str, Samples]) -> str:
    """What held-out losses depend on beside the weights."""
    sets = {name: sorted(samples.keys()) for name, samples in held_out.items()}
    settings = [config.objective.model_dump(), config.eval.quantiles, config.run.seed, config.data.normalize_masks]
    return hashlib.blake2b(json.dumps([sets, settings]).encode(), digest_size=8).hexdigest()
