"""Gradients and weights after three steps of changing shapes on every mesh, against one process that takes all samples by itself.

    python -m benchmarks.meshes [--families flux wan sdxl] [--meshes 1x1 2x1 1x2 2x2 4x1 3x1 1x4]

Of tiny models in float32, on GPUs (NCCL) where there are enough and else on the CPU (gloo), for each mesh of stages x replicas: replicas
with whole weights and with shares of them, all weights trained and a LoRA. Each step has a bucket of its own and three microbatches a
replica; AdamW takes all steps. Prints the largest difference of a gradient, relative to the largest gradient, and of a weight, relative
to the most that a weight has moved; the latter is larger because AdamW moves a weight whose gradient is all rounding as far as any other.
Ends with 1 where they are above 1e-5 and 1e-2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from benchmarks.synthetic import ROOT, Config
from diffpipe.config.schema import MeshConfig
from diffpipe.models import make_model
from diffpipe.models.adapters import is_adapter
from diffpipe.optim import make_optimizer, set_rates
from diffpipe.pipeline.build import build, outline
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.shard import gathered
from diffpipe.pipeline.stage import sum_errors
from tests.conftest import toy_checkpoint
from tests.families import drawn, frames_of, microbatch, with_weights

MICROBATCHES = 3
WITHIN = (1e-5, 1e-2)
KINDS = ("lora", "full")


@dataclass
class Worst:
    """The largest difference seen, and what it is relative to."""

    difference: float = 0.0
    scale: float = 0.0

    def see(self, got: torch.Tensor, expected: torch.Tensor, change: torch.Tensor) -> None:
        self.difference = max(self.difference, (got - expected).abs().max().item())
        self.scale = max(self.scale, change.abs().max().item())


def compare(family: str, kind: str, mesh: Mesh, checkpoint: Path) -> tuple[float, float]:
    """The largest relative differences of gradients and of weights, over all ranks."""
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {"stages": mesh.stages, "replicate": mesh.replicas // mesh.shards, "shard": mesh.shards},
            "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
            "adapter": {"rank": 4} if kind == "lora" else None,
            "optimizer": {"lr": 1e-3},
            "data": {"folders": [{"path": "unused"}]},
        }
    )
    model = make_model(config.model, config.objective)
    pipeline = build(config, model, mesh)
    part = pipeline.module
    for name, p in part.named_parameters():
        if is_adapter(name):
            p.data = drawn(name, p.shape).to(mesh.device)  # a B of zeros would leave every A without gradient
    whole, _ = outline(config.model_copy(update={"mesh": MeshConfig()}), model)
    one = dict(with_weights(whole, model).to(mesh.device).named_parameters())
    first = {name: p.detach().clone() for name, p in one.items()}
    optimizers = [make_optimizer(config.optimizer, each.items()) for each in (pipeline.trained, one)]
    gradients, weights = Worst(), Worst()
    for step, shape in enumerate([{"rows": 2, "columns": 3}, {"rows": 3, "columns": 2, "frames": frames_of(model)}, {}]):
        every = [microbatch(model, seed=10 * step + i, count=1, **shape) for i in range(MICROBATCHES * mesh.replicas)]
        pipeline.train(every[mesh.replica * MICROBATCHES : (mesh.replica + 1) * MICROBATCHES])
        own, _ = pipeline.gradients()
        here = tree_map(lambda x: x.to(mesh.device) if isinstance(x, torch.Tensor) else x, every)
        torch.stack([sum_errors(whole(**inputs, return_dict=False), targets) for inputs, targets in here]).mean().backward()
        trained = [name for name, p in part.named_parameters() if p.requires_grad and one[name].grad is not None]
        for name, gradient in zip(trained, own, strict=True):
            expected = one[name].grad
            assert expected is not None
            gradients.see(gathered(gradient), expected, expected)
        for optimizer in optimizers:
            set_rates(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for name, p in part.named_parameters():
        weights.see(gathered(p.detach()), one[name].detach(), one[name].detach() - first[name])
    found = mesh.largest(gradients.difference, gradients.scale, weights.difference, weights.scale)
    return found[0] / found[1], found[2] / found[3]


def run_rank(stages: int, replicate: int, shard: int, checkpoints: dict[str, Path]) -> None:
    with open_mesh(MeshConfig(stages=stages, replicate=replicate, shard=shard)) as mesh:
        for family, checkpoint in checkpoints.items():
            for kind in KINDS:
                of_gradients, of_weights = compare(family, kind, mesh, checkpoint)
                if mesh.reporter:
                    sharing = "shard" if shard > 1 else "replicate" if replicate > 1 else "one"
                    place = f"| {stages}x{replicate * shard} | {sharing} |"
                    print(f"{place} {family} | {kind} | {of_gradients:.1e} | {of_weights:.1e} |", flush=True)
                if of_gradients > WITHIN[0] or of_weights > WITHIN[1]:
                    raise SystemExit(1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--families", nargs="+", default=["flux", "wan", "sdxl"])
    options.add_argument("--meshes", nargs="+", default=["1x1", "2x1", "1x2", "2x2", "4x1", "3x1", "1x4"])
    options.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)  # stages, replicate, shard and the folder of tiny models
    given = options.parse_args()
    if given.rank:
        home = Path(given.rank[3])
        return run_rank(*map(int, given.rank[:3]), {family: toy_checkpoint(family, home) for family in given.families})
    print("| mesh | replicas | family | trains | gradients | weights |\n|" + " --- |" * 6, flush=True)
    with tempfile.TemporaryDirectory() as home:
        for family in given.families:
            toy_checkpoint(family, Path(home))
        for mesh in given.meshes:
            stages, replicas = map(int, mesh.split("x"))
            for replicate, shard in dict.fromkeys([(replicas, 1), (1, replicas)]):
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stages * replicas}"]
                program = ["-m", "benchmarks.meshes", "--rank", *map(str, (stages, replicate, shard)), home, "--families", *given.families]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run([sys.executable, *launcher, *program], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
    return None


if __name__ == "__main__":
    main()
