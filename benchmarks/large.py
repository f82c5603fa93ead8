"""Models of released size over several devices of one machine: how fast beside one of them, holding how much beside what is foreseen.

    python -m benchmarks.large wan-lora [--meshes 1x1x1 2x1x1 4x1x1 2x2x1] [--microbatches 8] [--steps 2]
    python -m benchmarks.large flux-full [--meshes 1x1x4 2x1x2 4x1x1]
    python -m benchmarks.large wan-lora --layers 4 --size 64x64x1 --meshes 1x1x1 2x1x1   # on CPUs, to try it

Random weights, the same on every mesh of stages x replicas x shards, and the same microbatches a step, which replicas and shards share.
Schedule and cut are those that the planner chooses. A step is timed from its first pass to the end of the optimizer's, on the slowest
rank, as the median after one that warms up. Prints of each mesh: seconds a step; how much of as many times one device's speed that is,
where the first mesh is one device, beside what is foreseen from the passes' order alone; what each stage held at the most, beside what
was foreseen; the loss of the first step and of the last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.synthetic import ROOT, Config, make_random, microbatches
from diffpipe.optim import make_optimizer, set_rates
from diffpipe.pipeline.build import build
from diffpipe.pipeline.memory.cards import find_card
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.pipeline.placement import Placer
from diffpipe.pipeline.rehearsal import Rehearsal

# By name: the family; height, width and frames; whether a LoRA is trained; meshes of four devices.
CASES: dict[str, tuple[str, str, bool, list[str]]] = {
    "wan-lora": ("wan", "512x512x33", True, ["1x1x1", "2x1x1", "4x1x1", "2x2x1"]),
    "flux-full": ("flux", "1024x1024x1", False, ["1x1x4", "2x1x2", "4x1x1"]),
}
LAYERS = {"wan": ("num_layers",), "flux": ("num_layers", "num_single_layers")}


def config_of(given: argparse.Namespace, stages: int, replicate: int, shard: int) -> Config:
    family, _, lora, _ = CASES[given.case]
    return Config.model_validate(
        {
            "run": {"steps": given.steps},
            "mesh": {"stages": stages, "replicate": replicate, "shard": shard},
            "model": {"family": family, "trainable_dtype": "bfloat16"},
            "adapter": {"rank": 32} if lora else None,
            "optimizer": {"kind": "adamw8bit-kahan"},
            "batch": {"accumulate": given.microbatches // (replicate * shard)},
            "data": {"folders": [{"path": "unused"}]},
        }
    )


def run_rank(given: argparse.Namespace) -> None:
    """This rank's part of one mesh's run."""
    height, width, frames = map(int, given.size.split("x"))
    config = config_of(given, *map(int, given.rank))
    changes = dict.fromkeys(LAYERS[config.model.family], given.layers) if given.layers else None
    with open_mesh(config.mesh) as mesh:
        model, card, bucket = make_random(config, changes), find_card(None, mesh.device), (frames, height, width)
        placement = mesh.decide(lambda: Placer(config, model, card, [bucket]).place())
        config = config.model_copy(update={"mesh": placement.mesh})
        foreseen = Rehearsal(config, model, mesh.stage, card).estimate(bucket, config.memory).peak
        pipeline = build(config, model, mesh)
        optimizer = make_optimizer(config.optimizer, pipeline.trained.items())
        set_rates(optimizer, 1.0)
        cuda, count = mesh.device.type == "cuda", config.batch.accumulate
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # what building took
        times, losses = [], []
        for step in range(given.steps + 1):
            every = microbatches(model, height, width, frames, given.microbatches, step)
            if cuda:
                torch.cuda.synchronize()
            mesh.barrier()
            begun = time.perf_counter()
            share = pipeline.train(every[mesh.replica * count : (mesh.replica + 1) * count])
            pipeline.gradients()
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            times.append(mesh.largest(time.perf_counter() - begun)[0])
            losses.append(mesh.sum(share.item())[0] / mesh.replicas)
        held = torch.cuda.max_memory_allocated() if cuda else 0
        stages: dict[int, tuple[int, int]] = {}
        for stage, pair in mesh.exchange((mesh.stage, (held, foreseen))):
            stages[stage] = max(stages.get(stage, (0, 0)), pair)
        if mesh.reporter:
            seconds = statistics.median(times[1:])
            memory = ", ".join(f"{h / 2**30:.1f} ({f / 2**30:.1f})" for _, (h, f) in sorted(stages.items()))
            told = [f"{seconds}", f"{1 - placement.course.bubble}", placement.mesh.schedule]
            print(*told, memory, "|", f"{losses[0]:.5f}, {losses[-1]:.5f}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("case", choices=CASES)
    options.add_argument("--meshes", nargs="+")
    options.add_argument("--microbatches", type=int, default=8, help="of a step, over all replicas")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--size", help="height x width x frames")
    options.add_argument("--layers", type=int, help="blocks of each kind, where all are too many to try")
    options.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)  # stages, replicas and shards
    given = options.parse_args()
    _, size, _, meshes = CASES[given.case]
    given.size = given.size or size
    if given.rank:
        return run_rank(given)
    for mesh in given.meshes or meshes:
        _, replicas, shards = map(int, mesh.split("x"))
        if given.microbatches % (replicas * shards):
            options.error(f"{given.microbatches} microbatches cannot be shared by the {replicas * shards} replicas of mesh {mesh}")
    print(f"{given.case} {given.size}, {given.microbatches} microbatches, torch {torch.__version__}", flush=True)
    print(
        "| mesh | schedule | s/step | of ideal | of passes' order | held (foreseen), GiB, by stage | losses |\n|" + " --- |" * 7, flush=True
    )
    alone = None
    for mesh in given.meshes or meshes:
        sizes = mesh.split("x")
        devices = int(sizes[0]) * int(sizes[1]) * int(sizes[2])
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
        program = ["-m", "benchmarks.large", *sys.argv[1:], "--rank", *sizes]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run([sys.executable, *launcher, *program], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        seconds, order, schedule, rest = done.stdout.strip().splitlines()[-1].split(" ", 3)
        alone = float(seconds) if devices == 1 else alone
        ideal = "" if alone is None else f"{alone / (devices * float(seconds)):.2f}"
        print(f"| {mesh} | {schedule} | {float(seconds):.2f} | {ideal} | {float(order):.2f} | {rest} |", flush=True)
    return None


if __name__ == "__main__":
    main()
