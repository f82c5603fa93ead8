"""A stage on fake tensors: what its steps would hold and how long they would take, found without a weight or a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from diffpipe.config.schema import Config
from diffpipe.models.base import DiffusionModel, Targets
from diffpipe.pipeline.build import outline, precision_of
from diffpipe.pipeline.cut import Fakes, Part, Probe, duplicate
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.estimate import Peak, find_peak
from diffpipe.pipeline.memory.footprint import Footprint, measure
from diffpipe.pipeline.memory.quantize import quantize
from diffpipe.pipeline.memory.timeline import Recorder, Timeline, Visit
from diffpipe.pipeline.stage import sum_errors

CPU = torch.device("cpu")


class Rehearsal:
    def __init__(self, config: Config, model: DiffusionModel, stage: int, products: bool) -> None:
        self.config, self.model, self.number = config, model, stage
        whole, spans = outline(config, model)
        self.stages = len(spans)
        self.fakes = Fakes(CPU)
        self.precision = precision_of(config, CPU)
        twins = [Part(duplicate(whole), model.spec, *span, self.fakes) for span in spans[:-1][: stage + 1]]
        for twin in twins:
            self.fakes.fill(twin)
        self.probe = Probe(twins, self.fakes, self.precision, model.spec.lengths)
        self.part = Part(whole, model.spec, *spans[stage], self.fakes)
        self.units = [self.part.model.get_submodule(u) for u in self.part.units]
        if config.memory.quantize == "fp8":
            for unit in self.units:
                quantize(unit, model.high_precision, products)
        self.fakes.fill(self.part)
        self.part.train()
        self.recorder = Recorder(self.units, self.fakes, self.precision)
        self.footprints: dict[Any, Footprint] = {}

    def timeline(self, inputs: dict[str, Any], targets: Targets) -> Timeline:
        borders = self.probe.borders(inputs)
        before = borders[self.number - 1] if self.number else None
        fake = {n: self._fake(n, x) for n, x in inputs.items()}
        wanted = tree_map(lambda x: self.fakes.tensor(x) if isinstance(x, Tensor) else x, targets)
        with self.fakes.mode:
            payload = tuple(self.fakes.tensor(t) for t in before.tensors) if before else ()
        given = [getattr(x, "twin", x) for x in tree_leaves((fake, wanted)) if isinstance(x, Tensor)]
        weights = [*self.part.parameters(), *self.part.buffers()]

        def forward() -> list[Tensor]:
            with self.precision():
                sent, _ = as_on_cuda(self.part)(payload, before.layout if before else None, fake)
            if not self.part.last:
                return list(sent)
            return [sum_errors(sent, wanted, self.config.objective.loss, self.config.objective.delta)]

        return self.recorder.record(weights, given, forward)

    def _fake(self, name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return self.fakes.known(torch.ones_like(x)) if name == self.model.spec.lengths else self.fakes.tensor(x)

    def footprint(self, timeline, visit, policy, threshold):
        key = (visit.kind, policy, threshold)
        if key not in self.footprints:
            unit, call = timeline.calls[visit.kind]
            standing = unit.__dict__.pop("forward")
            self.footprints[key] = measure(unit, call, self.fakes, policy, threshold)
            unit.forward = standing
        return self.footprints[key]
