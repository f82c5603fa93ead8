"""How well the planner's simulation foretells what steps take and how long stages idle, on 1 to 4 processes.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m benchmarks.simulation [--work blocks] [--rounds 5]
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=4 -m benchmarks.simulation --work pauses

Eight blocks of Wan of more than 20 ms, in every schedule. `blocks` runs them: it needs as many idle cores as processes, and nothing else
that runs beside. `pauses` has each block wait as long instead, so that a few cores do for all processes. Times of units are measured
first, as `mesh.split: time` does, one process after another. Prints a line a case, with what was predicted, the median of the rounds, and
the largest difference of all cases; 10 % is what the planner is held to.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.synthetic import Config, DiffusionModel, make_random, microbatches
from diffpipe.pipeline.build import build
from diffpipe.pipeline.calibrate import Seconds, keys, measure
from diffpipe.pipeline.memory.cards import find_card
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.placement import Placement, Placer, whole
from diffpipe.pipeline.schedule import Pipeline

LAYERS = 8
SIZES = {"num_layers": LAYERS, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "text_dim": 64}
SMALL = {"num_layers": LAYERS, "num_attention_heads": 1, "attention_head_dim": 16, "ffn_dim": 16, "text_dim": 16, "freq_dim": 16}
BUCKET = (1, 192, 256)  # 192 tokens
PAUSE: Seconds = (0.02, 0.04)
CASES = (("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zero-bubble", 1))


def config_of(stages: int, schedule: str, spans: int, count: int) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {"stages": stages, "schedule": schedule, "spans": spans, "split": "time"},
            "batch": {"accumulate": count},
            "model": {"family": "wan", "dtype": "float32"},
            "memory": {"recompute": "none"},
            "data": {"folders": [{"path": "unused"}]},
        }
    )


class Pause(torch.autograd.Function):
    """Takes its time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        time.sleep(PAUSE[0])
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(PAUSE[1])
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


def pausing(pipeline: Pipeline) -> None:
    for unit in pipeline.memory.units:
        weight = next(unit.parameters())
        unit.forward = lambda hidden, *args, weight=weight, **kwargs: Pause.apply(hidden, weight)


def times_of(config: Config, model: DiffusionModel, mesh: Mesh, pauses: bool) -> list[dict[Any, list[Seconds]]]:
    if pauses:
        return [{BUCKET: [PAUSE] * LAYERS}] * mesh.stages
    rehearsal = whole(config, model, find_card(None, mesh.device))
    known: dict[str, Seconds] = {}
    for rank in range(mesh.world):
        if rank == mesh.rank:
            known = measure(rehearsal, [BUCKET], mesh.device, {})
        mesh.barrier()
    return mesh.exchange({BUCKET: [known[key] for key in keys(rehearsal, BUCKET, mesh.device)]})


def run(placement: Placement, config: Config, model: DiffusionModel, mesh: Mesh, rounds: int, pauses: bool) -> tuple[float, float]:
    """Seconds of a step, and the part of it in which a stage idles: medians."""
    pipeline = build(config.model_copy(update={"mesh": placement.mesh}), model, mesh)
    if pauses:
        pausing(pipeline)
    batch = microbatches(model, *BUCKET[1:], BUCKET[0], config.batch.accumulate)
    seconds, bubbles = [], []
    for number in range(rounds + 1):
        mesh.barrier()
        pipeline.clock.take()
        begun = time.perf_counter()
        pipeline.train(batch)
        (took,) = mesh.largest(time.perf_counter() - begun)
        busy = sum(mesh.sum(pipeline.clock.take())) / mesh.stages
        if number:
            seconds.append(took)
            bubbles.append(1 - busy / took)
        pipeline.module.zero_grad()
    return statistics.median(seconds), statistics.median(bubbles)


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--work", choices=["blocks", "pauses"], default="blocks")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--microbatches", type=int, nargs="+", default=[4, 8])
    given = asked.parse_args()
    pauses, stages = given.work == "pauses", int(os.environ.get("WORLD_SIZE", 1))
    worst = 0.0
    with open_mesh(config_of(stages, "1f1b", 1, 1).mesh) as mesh:
        first = config_of(stages, "1f1b", 1, given.microbatches[0])
        model = make_random(first, SMALL if pauses else SIZES)
        times = times_of(first, model, mesh, pauses)
        for schedule, spans in CASES if stages > 1 else CASES[:1]:
            if pauses and schedule == "zero-bubble":
                continue  # a pause has no halves
            for count in given.microbatches:
                config = config_of(stages, schedule, spans, count)
                placement = Placer(config, model, find_card(None, mesh.device), [BUCKET], None, times).place()
                seconds, bubble = run(placement, config, model, mesh, given.rounds, pauses)
                off = placement.course.seconds / seconds - 1
                worst = max(worst, abs(off))
                if mesh.reporter:
                    told = f"{schedule} of {spans} span{'s' if spans > 1 else ''}, {stages} stages, {count} microbatches"
                    print(
                        f"{told}: {seconds:.3f} s, predicted {placement.course.seconds:.3f} ({off:+.1%});"
                        f" bubble {bubble:.1%}, predicted {placement.course.bubble:.1%}",
                        flush=True,
                    )
        if mesh.reporter:
            print(f"largest difference {worst:.1%}")


if __name__ == "__main__":
    main()
