"""Trains a few steps of changing shapes on a mesh: loss and gradients are the whole model's, no pass and no collective is run that
need not be, and streaming changes no weight.

    torchrun --nproc_per_node=STAGES*REPLICAS tests/pipeline/mesh_program.py STAGES REPLICAS FOLDER FAMILY/KIND ...

KIND is full, lora or streamed. Makes tiny checkpoints in FOLDER where they lack. Prints a line a case on the reporter; ends with a
fault where they differ.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffpipe.config.schema import Config, MeshConfig
from diffpipe.models import make_model, model_class
from diffpipe.models.base import DiffusionModel
from diffpipe.optim import make_optimizer
from diffpipe.pipeline.averaging import Averaging
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.schedule import Pipeline
from diffpipe.pipeline.stage import sum_errors
from tests.conftest import toy_checkpoint
from tests.families import drawn, frames_of, microbatch, whole_of

MICROBATCHES = 3


def compare(family: str, adapter: dict[str, Any] | None, mesh: Mesh, checkpoint: Path, encoders: bool = False) -> None:
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {"stages": mesh.stages, "replicate": mesh.replicas},
            "model": {"family": family, "path": str(checkpoint), "dtype": "float32", "train_text_encoders": encoders},
            "adapter": adapter,
            "data": {"folders": [{"path": "unused"}]},
        }
    )
    model = make_model(config.model, config.objective)
    pipeline = build(config, model, mesh)
    part = pipeline.module
    for name, p in part.named_parameters():
        if p.requires_grad and adapter is not None:
            p.data = drawn(name, p.shape)  # a B of zeros would leave every A without gradient
    whole = whole_of(config, model) if mesh.reporter else None
    log = Log(pipeline, bucket=1 << 12 if adapter is None else 1 << 25)
    shapes = [{"rows": 2, "columns": 3}, {"rows": 3, "columns": 2, "frames": frames_of(model)}]
    for step, shape in enumerate(shapes):
        batch = batch_of(model, step, mesh.replica, shape)
        with Collectives() as collectives:
            share = pipeline.train(batch)
            log.check()
            _, counted = pipeline.gradients()
        assert collectives.names == ["allreduce_"] * log.collectives(), collectives.names
        loss, norm = mesh.loss_and_norm(share, counted)
        gradients = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
        total, expected = mesh.decide(partial(of_whole, whole, model, step, shape, batch, mesh.replicas))
        torch.testing.assert_close(loss.float(), total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm, torch.stack([g.norm() for g in expected.values()]).norm(), rtol=1e-4, atol=1e-6)
        held = {n for n, p in part.named_parameters() if p.requires_grad and n in expected}
        assert gradients.keys() == held, sorted(gradients.keys() ^ held)[:4]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{family} {n}: {m}")
        part.zero_grad()
    if mesh.reporter:
        print(f"same: {family}/{'lora' if adapter else 'full'}", flush=True)


def batch_of(model: DiffusionModel, step: int, replica: int, shape: dict[str, int]) -> list[Any]:
    seeds = range(10 * step + replica * MICROBATCHES, 10 * step + (replica + 1) * MICROBATCHES)
    return [microbatch(model, seed=seed, count=2, **shape) for seed in seeds]


def of_whole(
    whole: nn.Module | None, model: DiffusionModel, step: int, shape: dict[str, int], first: list[Any], replicas: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the whole model over all replicas' microbatches, of which the first replica's are here."""
    assert whole is not None
    every = [*first, *(pair for replica in range(1, replicas) for pair in batch_of(model, step, replica, shape))]
    whole.zero_grad()
    total = torch.stack([sum_errors(whole(**inputs, return_dict=False), targets) for inputs, targets in every]).mean()
    total.backward()
    return total.detach(), {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}


class Collectives(TorchDispatchMode):
    """Notes the collectives of floats that are begun while it is entered; torch 2.15 sets up new schedules with some of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("send", "recv_"):
            floats = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tree_leaves(args))
            self.names += [func._opname] if floats else []
        return func(*args, **(kwargs or {}))


class Log:
    """What a pipeline's steps run, for one that has run none.

    Args:
        bucket: bytes at which a bucket of gradients is closed.
    """

    def __init__(self, pipeline: Pipeline, bucket: int) -> None:
        self.mesh, self.part = pipeline.mesh, pipeline.spans[0].part
        self.trained = [p for p in self.part.model.parameters() if p.requires_grad]
        averaged = self.trained if self.mesh.replicas > 1 else []
        self.averaging = pipeline.averaging = Averaging(averaged, self.mesh.replica_group, bucket)
        self.passes = 0
        self.part.register_forward_hook(self._passed)
        self.sent: list[int] = []  # buckets that were on their way whenever the first parameter, the last to come, had its gradient
        self.trained[0].register_post_accumulate_grad_hook(lambda p: self.sent.append(self.averaging.sent))

    def _passed(self, *call: Any) -> None:
        self.passes += 1

    def check(self) -> None:
        """A step has passed each microbatch once; gradients were sent within the backward pass of the last, and before all had come."""
        assert self.passes == MICROBATCHES, f"{self.passes} forward passes, also where shapes are new"
        buckets = len(self.averaging.buckets)
        assert self.averaging.sent == buckets
        if buckets > 2:
            assert self.sent[-1] > 0 and not any(self.sent[:-1]), self.sent
        self.passes = 0
        self.sent.clear()

    def collectives(self) -> int:
        """How many a step needs: one for each bucket, and one for each parameter that every stage has."""
        trained = {n for n, p in self.part.model.named_parameters() if p.requires_grad}
        return len(self.averaging.buckets) + (len(trained & self.part.repeated) if self.mesh.stages > 1 else 0)


def compare_streamed(family: str, mesh: Mesh, checkpoint: Path) -> None:
    """All weights stepped in the backward passes, and at the end of each step."""

    def stepped(memory: dict[str, Any]) -> tuple[list[float], list[torch.Tensor], dict[str, torch.Tensor]]:
        config = Config.model_validate(
            {
                "run": {"steps": 1},
                "mesh": {"stages": mesh.stages, "replicate": mesh.replicas},
                "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
                "optimizer": {"clip": None},
                "data": {"folders": [{"path": "unused"}]},
                "memory": memory,
            }
        )
        model = make_model(config.model, config.objective)
        pipeline = build(config, model, mesh)
        part = pipeline.module
        optimizer = make_optimizer(config.optimizer, part.named_parameters())
        release = pipeline.memory.release_with(optimizer, mesh.mean_over_replicas)
        losses, norms, schedules = [], [], []
        for step in range(2):
            batch = [microbatch(model, seed=100 * step + 10 * mesh.replica + i, count=1) for i in range(MICROBATCHES)]
            share = pipeline.train(batch)
            losses.append(share.item())
            _, counted = pipeline.gradients()
            norms.append(mesh.loss_and_norm(share, counted, release.square())[1])
            release.step_rest()
            schedules.append(pipeline.kept.held)
        assert all(schedule is schedules[0] for schedule in schedules), "a step of the same shapes has the schedule of the last"
        pipeline.memory.settle()
        return losses, norms, {n: p.detach().clone() for n, p in part.named_parameters()}

    losses, norms, weights = stepped({"swap": "all"})
    wanted, expected, held = stepped({})
    assert losses == wanted
    torch.testing.assert_close(norms, expected)
    for name, weight in weights.items():
        assert torch.equal(weight, held[name]), f"{family} {name}"
    if mesh.reporter:
        print(f"same: {family}/streamed", flush=True)


def main() -> None:
    stages, replicas = int(sys.argv[1]), int(sys.argv[2])
    # Before the processes meet: in a group, transformers saves on its first rank alone.
    cases = [case.split("/") for case in sys.argv[4:]]
    checkpoints = {family: toy_checkpoint(family, Path(sys.argv[3])) for family, _ in cases}
    with open_mesh(MeshConfig(stages=stages, replicate=replicas)) as opened:
        for family, kind in cases:
            if kind == "streamed":
                compare_streamed(family, opened, checkpoints[family])
            else:
                encoders = kind == "full" and "model.train_text_encoders" in model_class(family).options
                compare(family, {"rank": 4} if kind == "lora" else None, opened, checkpoints[family], encoders)


if __name__ == "__main__":
    main()
