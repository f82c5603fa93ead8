"""Names every rank of a run: its stage, its replica, its device and its neighbours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from diffpipe.config.schema import MeshConfig
from diffpipe.errors import ConfigError, DiffpipeError

T = TypeVar("T")

# A stage may wait while another reads 28 GB of weights from a slow disk.
PATIENCE = timedelta(minutes=60)


@dataclass(frozen=True)
class Mesh:
    """This rank's place.

    Attributes:
        rank, world: among all processes.
        stage, stages: place along the pipeline.
        replica, replicas: place among the copies of the pipeline.
        device: what this rank computes on.
        stage_group: the ranks that form this rank's pipeline.
        replica_group: the ranks that hold the same stage.
    """

    rank: int
    world: int
    stage: int
    stages: int
    replica: int
    replicas: int
    device: torch.device
    stage_group: ProcessGroup
    replica_group: ProcessGroup

    @property
    def reporter(self) -> bool:
        """Whether this rank speaks for the run: the last stage, which holds the loss, of replica 0."""
        return self.stage == self.stages - 1 and self.replica == 0

    @property
    def reporter_rank(self) -> int:
        return (self.stages - 1) * self.replicas

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """The sum over all ranks of each value."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """The largest over all ranks of each value."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op=how)
        return total.tolist()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, as many on each, in the order of ranks."""
        if self.world == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        all_ranks = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(all_ranks, own)
        return torch.stack(all_ranks).tolist()

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def decide(self, choose: Callable[[], T]) -> T:
        """What ``choose`` gives on the reporter, on every rank; a DiffpipeError is raised on every rank too."""
        if self.world == 1:
            return choose()
        box: list[Any] = [None]
        if self.reporter:
            try:
                box = [choose()]
            except DiffpipeError as fault:
                box = [fault]
        dist.broadcast_object_list(box, src=self.reporter_rank, device=self.device)
        if isinstance(box[0], DiffpipeError):
            raise box[0]
        return box[0]

    def gradient_norm(self, gradients: Sequence[Tensor], more: Tensor | float = 0.0) -> Tensor:
        """The L2 norm of all stages' gradients together, in float32.

        Args:
            more: this stage's squared norm of those that are gone already.
        """
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        square = (torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)) + more
        if self.stages > 1:
            dist.all_reduce(square, group=self.stage_group)
        return square.sqrt()

    def sum_over_stages(self, tensor: Tensor) -> None:
        """Replace a tensor that every stage has by its sum."""
        dist.all_reduce(tensor, group=self.stage_group)

    def mean_over_replicas(self, tensors: Sequence[Tensor], chunk: int = 1 << 26) -> None:
        """Replace each tensor by its mean over the replicas, in flat chunks of about ``chunk`` bytes."""
        if self.replicas == 1:
            return
        for group in _chunks(tensors, chunk):
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat, group=self.replica_group)
            flat /= self.replicas
            for t, mean in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(mean.view_as(t))


def _chunks(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for t in tensors:
        if group and (size + t.nbytes > limit or t.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(t)
        size += t.nbytes
    if group:
        yield group


@contextmanager
def open_mesh(config: MeshConfig) -> Iterator[Mesh]:
    """Join the run's processes; leaves the group on the way out.

    Without torchrun's variables this is a world of one on gloo with an in-process store: no port is opened,
    which is what native Windows needs.

    Raises:
        ConfigError: when the number of processes is not stages x replicate x shard, or a process has no device.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    wanted = config.stages * config.replicate * config.shard
    if world != wanted:
        raise ConfigError(
            f"{world} process{'es' if world > 1 else ''} for stages {config.stages} x replicate {config.replicate} x shard {config.shard}",
            where="mesh",
            expected=f"{wanted} process{'es' if wanted > 1 else ''}",
            fix=f"start with torchrun --nproc_per_node={wanted}, or change mesh.stages or mesh.replicate",
        )
    device = _device(int(os.environ.get("LOCAL_RANK", 0)) if launched else 0)
    if launched:
        nccl = device.type == "cuda" and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE, device_id=device if nccl else None)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        axes = init_device_mesh(
            "cuda" if device.type == "cuda" and launched else "cpu",
            (config.stages, config.replicate),
            mesh_dim_names=("stage", "replicate"),
        )
        yield Mesh(
            rank=dist.get_rank(),
            world=world,
            stage=axes.get_local_rank("stage"),
            stages=config.stages,
            replica=axes.get_local_rank("replicate"),
            replicas=config.replicate,
            device=device,
            stage_group=axes.get_group("stage"),
            replica_group=axes.get_group("replicate"),
        )
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found",
            where="mesh",
            expected="one process per GPU",
            fix="lower --nproc_per_node and mesh.stages or mesh.replicate, or make more GPUs visible",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
