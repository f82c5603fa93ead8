"""1F1B over two processes of one thread each: how near it comes to the ideal speed, and how DeepSpeed's PipelineEngine does.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m benchmarks.schedule [--rounds 5] [--microbatches 2 4 8] [--kinds lora full] [--spans 2]

Eight blocks of Wan of more than 20 ms, four a stage. In each round by turns: one process takes the whole step while the other waits,
both take it whole at once, the two stages take it, they take it by eager 1F1B, which runs a microbatch further ahead, they take it
interleaved with several spans of blocks each, as the planner would have it, and DeepSpeed, which has neither of these schedules, takes
it with stages of the same parts and the same optimizer. Of m microbatches on p stages the ideal step of 1F1B lasts
(m + p - 1) / (m p) of that of one process: alone, or beside another, since cores share caches, memory and power. Ratios are medians
over the rounds. Leave the two cores to it; it takes a minute or two a round there.

DeepSpeed takes part where it is installed, which diffpipe does not need:

    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install deepspeed
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.synthetic import Config, DiffusionModel, make_random, microbatches
from diffpipe.models.base import Targets
from diffpipe.optim import make_optimizer, set_rates
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.pipeline.stage import sum_errors

LAYERS, STAGES = 8, 2
SIZES = {"num_layers": LAYERS, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "text_dim": 64}
HEIGHT, WIDTH = 192, 256  # 192 tokens
Batch = list[tuple[dict[str, Any], Targets]]
OURS = {"1F1B": "1f1b", "eager 1F1B": "eager-1f1b", "interleaved": "interleaved"}  # as ``mesh.schedule`` has them
NAMES = ("alone", "beside", *OURS, "DeepSpeed")
Step = Callable[[Batch], float]


def config_of(kind: str, stages: int, schedule: str = "1f1b", spans: int = 1) -> Config:
    count = stages * spans
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {
                "stages": stages,
                "schedule": schedule,
                "spans": spans,
                "split": [LAYERS // count * i for i in range(1, count)],
            },
            "model": {"family": "wan", "dtype": "float32"},
            "adapter": {"rank": 16} if kind == "lora" else None,
            "memory": {"recompute": "none"},
            "data": {"folders": [{"path": "unused"}]},
        }
    )


def ours(config: Config, model: DiffusionModel, mesh: Mesh) -> Step:
    """A step as training takes it."""
    pipeline = build(config, model, mesh)
    optimizer = make_optimizer(config.optimizer, pipeline.trained.items())
    set_rates(optimizer, 1.0)

    def step(batch: Batch) -> float:
        share = pipeline.train(batch)
        pipeline.gradients()
        optimizer.step()
        optimizer.zero_grad()
        return mesh.sum(share.item())[0]  # on every rank, as DeepSpeed does

    return step


class Layer(nn.Module):
    """A stage's part as DeepSpeed takes it: tensors that all require gradients, microbatches in their order."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.part, self.probe = pipeline.spans[0].part, pipeline.probe
        self.batch: Batch = []
        self.number = 0

    def forward(self, payload: Any) -> Any:
        inputs, _ = self.batch[self.number % len(self.batch)]
        self.number += 1
        arrived = () if self.part.first else payload if isinstance(payload, tuple) else (payload,)
        layout = None if self.part.first else self.probe.borders(inputs)[0].layout
        sent, _ = self.part(arrived, layout, inputs)
        # It sends a gradient back for each float tensor that crosses.
        return sent if self.part.last else tuple(t if t.requires_grad else t.clone().requires_grad_() for t in sent)


def deepspeeds(config: Config, model: DiffusionModel, mesh: Mesh, count: int) -> Step:
    """The same step by DeepSpeed's PipelineEngine."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    import deepspeed
    from deepspeed.pipe import PipelineModule

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    layer = Layer(build(config, model, mesh))

    def loss(outputs: Any, number: Tensor) -> Tensor:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum_errors(outputs, layer.batch[int(number)][1])

    module = PipelineModule([layer] * STAGES, num_stages=STAGES, loss_fn=loss, partition_method="uniform")
    optimizer = make_optimizer(config.optimizer, [(n, p) for n, p in layer.named_parameters() if p.requires_grad])
    set_rates(optimizer, 1.0)
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": count, "steps_per_print": 10**9}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)

    def numbers() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from ((torch.zeros(1), torch.tensor(i)) for i in range(count))

    feed = numbers()

    def step(batch: Batch) -> float:
        layer.batch, layer.number = batch, 0
        return float(engine.train_batch(feed))

    return step


def timed(step: Step | None, batch: Batch, mesh: Mesh) -> tuple[float, float]:
    """Seconds of a step until all ranks are through, and its loss; a rank without a step waits."""
    mesh.barrier()
    begun = time.perf_counter()
    loss = step(batch) if step is not None else math.nan
    mesh.barrier()
    return time.perf_counter() - begun, loss


def compare(kind: str, counts: Sequence[int], rounds: int, spans: int, mesh: Mesh, one: Mesh) -> None:
    """Print a row for each number of microbatches."""
    config = config_of(kind, STAGES)
    model = make_random(config, SIZES)
    for count in counts:
        batch = microbatches(model, HEIGHT, WIDTH, 1, count)
        # With weights of their own, so that all begin with the same.
        whole = ours(config_of(kind, 1), model, one)
        steps: dict[str, Step | None] = {"alone": None if mesh.rank else whole, "beside": whole}
        for name, schedule in OURS.items():
            steps[name] = ours(config_of(kind, STAGES, schedule, spans if schedule == "interleaved" else 1), model, mesh)
        if find_spec("deepspeed"):
            steps["DeepSpeed"] = deepspeeds(config, model, mesh, count)
        firsts = [timed(step, batch, mesh)[1] for step in steps.values()]  # which warms up, too
        del firsts[1]  # the second step of the weights that went alone
        if not mesh.rank and any(abs(loss - firsts[0]) > 1e-4 * firsts[0] for loss in firsts[1:]):
            raise SystemExit(f"losses of the first step differ: {firsts}")
        times = {name: [0.0] * rounds for name in steps}
        for each in range(rounds):
            for name, step in steps.items():
                times[name][each], _ = timed(step, batch, mesh)
        if not mesh.rank:
            print(row(kind, count, times), flush=True)


def row(kind: str, count: int, times: dict[str, list[float]]) -> str:
    ideal = (count + STAGES - 1) / (count * STAGES)

    def ratio(first: str, second: str, share: float = 1.0) -> str:
        if first not in times:  # DeepSpeed, which is not installed
            return ""
        return spread([one * share / other for one, other in zip(times[first], times[second], strict=True)])

    told = [kind, count, *(f"{statistics.median(times[name]):.3f}" if name in times else "" for name in NAMES)]
    told += [ratio("alone", name, ideal) for name in OURS] + [ratio("DeepSpeed", name) for name in OURS]
    told += [ratio("beside", name, ideal) for name in OURS]
    return f"| {' | '.join(map(str, told))} |"


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def forward_time(model: DiffusionModel, one: Mesh) -> float:
    """Seconds of a block's forward pass, the least of some."""
    pipeline = build(config_of("lora", 1), model, one)
    batch = microbatches(model, HEIGHT, WIDTH, 1, 2)
    took = []
    for _ in range(4):
        begun = time.perf_counter()
        pipeline.evaluate(batch)
        took.append((time.perf_counter() - begun) / (LAYERS * len(batch)))
    return min(took)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--kinds", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    options.add_argument("--spans", type=int, choices=[2, 4], default=2, help="of each stage, interleaved")
    given = options.parse_args()
    torch.set_num_threads(1)
    with open_mesh(config_of("lora", STAGES).mesh) as mesh:
        one = replace(mesh, rank=0, world=1, stage=0, stages=1, stage_group=mesh.replica_group)
        if not mesh.rank:
            block = forward_time(make_random(config_of("lora", 1), SIZES), one)
            print(f"torch {torch.__version__}; a block's forward pass takes {block * 1000:.0f} ms", flush=True)
            columns = ["trains", "microbatches", *(f"{name}, s" for name in NAMES)]
            ratios = ("{} of 1F1B's ideal alone", "DeepSpeed to {}", "{} of 1F1B's ideal beside another")
            columns += [ratio.format(name) for ratio in ratios for name in OURS]
            print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        for kind in given.kinds:
            compare(kind, given.microbatches, given.rounds, given.spans, mesh, one)


if __name__ == "__main__":
    main()
