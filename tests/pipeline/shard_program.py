"""Trains three steps of changing shapes on a mesh with shards: losses, gradients and weights are those of one process.

    torchrun --nproc_per_node=STAGES*REPLICATE*SHARD tests/pipeline/shard_program.py STAGES REPLICATE SHARD FOLDER CASE ...

A CASE is FAMILY-KIND-RESHARD, such as wan-full-true. Makes tiny checkpoints in FOLDER where they lack. Prints a line a case on the
reporter; ends with a fault where something differs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from diffpipe.config.schema import Config, MeshConfig
from diffpipe.models import make_model
from diffpipe.models.adapters import is_adapter
from diffpipe.optim import make_optimizer
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import Mesh, open_mesh
from diffpipe.pipeline.shard import gathered, local
from diffpipe.pipeline.stage import sum_errors
from tests.conftest import toy_checkpoint
from tests.families import drawn, frames_of, microbatch, whole_of

MICROBATCHES = 3


def compare(family: str, kind: str, reshard: bool, mesh: Mesh, checkpoint: Path) -> None:
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "mesh": {"stages": mesh.stages, "replicate": mesh.replicas // mesh.shards, "shard": mesh.shards, "reshard": reshard},
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
            p.data = drawn(name, p.shape)  # a B of zeros would leave every A without gradient
        elif p.ndim:
            assert isinstance(p, DTensor) and len(local(p)) <= -(-len(p) // mesh.shards), f"{name} is not shared out"
    one = whole_of(config, model) if mesh.reporter else nn.Module()
    weights, log = dict(one.named_parameters()), Log(pipeline.memory.units)
    optimizers = [make_optimizer(config.optimizer, each.items()) for each in (pipeline.trained, weights) if each]
    for step, shape in enumerate([{"rows": 2, "columns": 3}, {"rows": 3, "columns": 2, "frames": frames_of(model)}, {}]):
        every = [microbatch(model, seed=10 * step + i, count=1, **shape) for i in range(MICROBATCHES * mesh.replicas)]
        batch = every[mesh.replica * MICROBATCHES : (mesh.replica + 1) * MICROBATCHES]
        share = pipeline.train(batch)
        log.check(reshard, trains=kind == "full")
        gradients, counted = pipeline.gradients()
        loss, norm = mesh.loss_and_norm(share, counted)
        total, expected = mesh.decide(partial(of_one, one, every))
        torch.testing.assert_close(loss.float(), total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm, torch.stack([g.norm() for g in expected.values()]).norm())
        names = [n for n, p in part.named_parameters() if p.requires_grad]
        for name, gradient in zip(names, gradients, strict=True):
            same(f"{family} {name}", gradient, expected.get(name), atol=2e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = mesh.decide(lambda: {name: p.detach() for name, p in weights.items()})
    for name, p in part.named_parameters():
        same(f"{family} {name}", p.detach(), expected[name], atol=2e-5)
    with torch.no_grad():
        pipeline.evaluate(batch)
    assert not any(map(whole, log.units)), "an evaluation keeps nothing gathered"
    if mesh.reporter:
        print(f"same: {family}-{kind}-{str(reshard).lower()}", flush=True)


def of_one(one: nn.Module, every: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one process."""
    total = torch.stack([sum_errors(one(**inputs, return_dict=False), targets) for inputs, targets in every]).mean()
    total.backward()
    return total.detach(), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}


def same(what: str, got: torch.Tensor, expected: torch.Tensor | None, atol: float) -> None:
    torch.testing.assert_close(gathered(got), expected, rtol=1e-4, atol=atol, msg=lambda m: f"{what}: {m}")


def whole(unit: nn.Module) -> bool:
    """Whether weights of a unit are gathered."""
    return not all(isinstance(p, DTensor) for n, p in unit.named_parameters() if not is_adapter(n) and p.ndim)


class Log:
    """What is gathered and reduced of a pipeline's units, by number, and which of them are whole meanwhile."""

    def __init__(self, units: list[nn.Module]) -> None:
        self.units, self.gathers, self.reductions = units, Counter[int](), Counter[int]()
        self.coming: set[int] = set()  # gathered, and not used yet
        self.most = 0
        for number, unit in enumerate(units):
            unit.set_custom_all_gather(Comm(partial(self._gathered, number), dist.all_gather_into_tensor))  # pyright: ignore
            unit.set_custom_reduce_scatter(Comm(partial(self.reductions.update, [number]), dist.reduce_scatter_tensor))  # pyright: ignore
            first = next(m for m in unit.modules() if not any(m.children()))  # inside the unit, so that it is computed again too
            first.register_forward_pre_hook(lambda module, args, number=number: self.coming.discard(number))

    def _gathered(self, number: int) -> None:
        self.gathers[number] += 1
        self.coming.add(number)
        self.most = max(self.most, sum(number in self.coming or whole(unit) for number, unit in enumerate(self.units)))

    def check(self, reshard: bool, trains: bool) -> None:
        """A step has gathered each unit once, or for every pass and never more than two at a time; nothing stays gathered."""
        each = MICROBATCHES if reshard else 1
        assert set(self.gathers.values()) == {2 * each if reshard else 1} and len(self.gathers) == len(self.units), self.gathers
        assert set(self.reductions.values()) == ({each} if trains else set()), self.reductions
        assert self.most == (2 if reshard else len(self.units)), self.most
        assert not any(map(whole, self.units)), "nothing stays gathered"
        self.gathers.clear()
        self.reductions.clear()


class Comm:
    """A collective of torch's that tells when it is begun."""

    def __init__(self, tell: Callable[[], None], run: Callable[..., Any]) -> None:
        self.tell, self.run = tell, run

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, *how: Any, **named: Any) -> Any:
        self.tell()
        return self.run(output_tensor, input_tensor, *how, group=group, **named)


def main() -> None:
    stages, replicate, shard = map(int, sys.argv[1:4])
    cases = [case.split("-") for case in sys.argv[5:]]
    # Before the processes meet: in a group, transformers saves on its first rank alone.
    checkpoints = {family: toy_checkpoint(family, Path(sys.argv[4])) for family, _, _ in cases}
    with open_mesh(MeshConfig(stages=stages, replicate=replicate, shard=shard)) as mesh:
        for family, kind, reshard in cases:
            compare(family, kind, reshard == "true", mesh, checkpoints[family])


if __name__ == "__main__":
    main()
