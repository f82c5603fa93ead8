"""Trains three steps of changing shapes in each schedule: losses, gradients and weights are those of the whole model in one process.

    torchrun --nproc_per_node=STAGES tests/pipeline/schedule_program.py STAGES FOLDER FAMILY/SCHEDULE/KIND/SHARD ...

KIND is lora, streamed (a LoRA, all frozen blocks streamed) or full; SHARD ranks share the weights of each stage, of which there are so
many fewer. Prints a line a case on the reporter; ends with a fault where they differ.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.config.schema import Config
from diffpipe.models import make_model
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.shard import gathered, local
from diffpipe.pipeline.stage import sum_errors
from tests.conftest import toy_checkpoint
from tests.families import drawn, frames_of, microbatch, whole_of

MICROBATCHES = 4
RATE = 0.1


def config_of(case: str, world: int, checkpoint: Path) -> Config:
    family, schedule, kind, shard = case.split("/")
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {
                **{"stages": world // int(shard), "shard": int(shard), "schedule": schedule, "reshard": False},
                "spans": 2 if schedule == "zero-bubble" else None,  # so that something arrives and leaves
            },
            "batch": {"accumulate": MICROBATCHES},
            "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
            "adapter": None if kind == "full" else {"rank": 4},
            "data": {"folders": [{"path": "unused"}]},
            "memory": {"recompute": "none" if schedule == "zero-bubble" else "block", "swap": "all" if kind == "streamed" else 0},
        }
    )


def compare(case: str, config: Config, mesh: Mesh) -> None:
    model = make_model(config.model, config.objective)
    pipeline = build(config, model, mesh)
    if config.adapter is not None:
        for name, p in pipeline.trained.items():
            p.data.copy_(drawn(name, p.shape))  # a B of zeros would leave every A without gradient
    whole = whole_of(config, model) if mesh.reporter else nn.Module()
    expected = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    names = set(mesh.decide(lambda: list(expected)))
    held = [name for name, _ in pipeline.module.named_parameters()]
    assert len(set(held)) == len(held) and set(pipeline.trained) <= names
    assert set().union(*mesh.exchange(set(pipeline.trained))) == names
    for step in range(3):
        shape = {"rows": 2 + step % 2, "columns": 3 - step % 2, "frames": frames_of(model) if step == 1 else 1}
        every = [microbatch(model, seed=10 * step + i, count=1, **shape) for i in range(MICROBATCHES * mesh.replicas)]
        held_out = mesh.sum(pipeline.evaluate(every[:1]).item())[0] / mesh.replicas
        share = pipeline.train(every[mesh.replica * MICROBATCHES : (mesh.replica + 1) * MICROBATCHES])
        _, counted = pipeline.gradients()
        loss, norm = mesh.loss_and_norm(share, counted)
        losses, wanted = mesh.decide(partial(of_whole, whole, every))
        near(torch.tensor(held_out), losses[0], f"{case} evaluation")
        near(loss.float(), losses.mean(), f"{case} loss")
        near(norm, wanted, f"{case} norm")
        for parameters in (pipeline.trained, expected):
            for p in parameters.values():
                if p.grad is not None:
                    p.data.sub_(local(p.grad), alpha=RATE)
                p.grad = None
    weights = mesh.decide(lambda: {name: p.detach() for name, p in expected.items()})
    for name, p in pipeline.module.named_parameters():
        if p.requires_grad:
            near(gathered(p.detach()), weights[name], f"{case} {name}")
    assert pipeline.kept.held is not None
    assert not held_between_steps(pipeline.kept.held[1][1]), f"{case} holds memory for what stages receive between steps"
    if mesh.reporter:
        print(f"same: {case}", flush=True)


def of_whole(whole: nn.Module, every: list[Any]) -> tuple[Tensor, Tensor]:
    """Each microbatch's loss, and the norm of the gradients that the whole model now has."""
    losses = torch.stack([sum_errors(whole(**inputs, return_dict=False), targets) for inputs, targets in every])
    losses.mean().backward()
    return losses.detach(), torch.stack([p.grad.norm() for p in whole.parameters() if p.grad is not None]).norm()


def held_between_steps(stages: Any) -> list[Tensor]:
    """What torch's stages have on their device to receive into."""
    every = [info for s in stages for infos in (*s.args_recv_info.values(), *s.grad_recv_info.values()) for info in infos]
    assert every
    buffers = [getattr(info, "buffer", None) for info in every]
    return [b for b in buffers if b is not None and not b.is_meta]


def near(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6, msg=lambda told: f"{what}: {told}")


def main() -> None:
    world, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    # Before the processes meet: in a group, transformers saves on its first rank alone.
    configs = {case: config_of(case, world, toy_checkpoint(case.split("/")[0], folder)) for case in cases}
    for shard in sorted({config.mesh.shard for config in configs.values()}):
        chosen = {case: config for case, config in configs.items() if config.mesh.shard == shard}
        with open_mesh(next(iter(chosen.values())).mesh) as mesh:
            for case, config in chosen.items():
                compare(case, config, mesh)


if __name__ == "__main__":
    main()
