"""Names every rank of a run: its stage, its replica, its shard, its device and its neighbours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from diffpipe.config.load import differences
from diffpipe.config.schema import MeshConfig
from diffpipe.errors import ConfigError, DiffpipeError
from diffpipe.pipeline.alone import OwnStore
from diffpipe.pipeline.launcher import ended_with_torchrun
from diffpipe.pipeline.shard import local

T = TypeVar("T")

# A stage may wait while another reads 28 GB of weights from a slow disk.
PATIENCE = timedelta(minutes=60)
MEETING = timedelta(minutes=10)  # for all processes to be there
DIMS = 8  # that a tensor has at most


@dataclass(frozen=True)
class Mesh:
    """This rank's place.

    Attributes:
        rank, world: among all processes.
        stage, stages: place along the pipeline.
        replica, replicas: place among those that train on different samples: replicate x shard, the latter side by side.
        shard, shards: place among the ranks that share a stage's weights.
        device: what this rank computes on.
        stage_group: the ranks that form this rank's pipeline.
        replica_group: the ranks that hold the same stage, or a shard of it.
        store: what all ranks read and write without waiting for each other.
        axes: those of the replica group, replicate (where that is several) and shard; None where weights are whole.
    """

    rank: int
    world: int
    stage: int
    stages: int
    replica: int
    replicas: int
    shard: int
    shards: int
    device: torch.device
    stage_group: ProcessGroup
    replica_group: ProcessGroup
    store: Store
    axes: DeviceMesh | None

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
        return self._gathered(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def _gathered(self, own: Tensor) -> Tensor:
        """Every rank's tensor, of one shape on all, in the order of ranks along a new first dim."""
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own)
        return torch.stack(every)

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

    def loss_and_norm(self, share: Tensor, gradients: Sequence[Tensor], more: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """What a step must know before it moves the weights, the same on every rank, for which ranks tell each other once.

        Args:
            share: float32, the loss on the last stage of each pipeline, 0 on the others.
            gradients: this rank's, of whole weights averaged over the replicas.
            more: this stage's squared norm of those that are gone already.

        Returns:
            The mean of the replicas' losses, in float64; and the L2 norm of all stages' gradients together, of sharded ones of all shards,
            in float32.
        """
        whole = self._square([g for g in gradients if not isinstance(g, DTensor)]) + more
        sharded = self._square([g for g in gradients if isinstance(g, DTensor)])
        own = torch.stack([share, whole, sharded])
        every = (self._gathered(own) if self.world > 1 else own).view(self.stages, -1, self.shards, 3)
        # Replicas have the same gradients; those of one, so that all ranks clip alike whatever they compute on.
        squares = every[:, 0, 0, 1] + every[:, 0, :, 2].sum(1)
        return every[..., 0].double().sum() / self.replicas, squares.sum().sqrt()

    def _square(self, gradients: Sequence[Tensor]) -> Tensor:
        norms = [torch.linalg.vector_norm(local(g), dtype=torch.float32) for g in gradients]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)

    def sum_over_stages(self, tensor: Tensor) -> None:
        """Replace a tensor that every stage has, or a shard of it, by its sum.

        One at a time: few models have any, and in one flat tensor the stages would be added up in another order.
        """
        dist.all_reduce(local(tensor), group=self.stage_group)

    def any_partner(self, flag: bool) -> bool:
        """Whether it is set on any rank that this one computes with: the stages of its pipeline, or all where weights are shared."""
        if self.shards > 1:
            return bool(self.largest(float(flag))[0])
        if self.stages == 1:
            return flag
        told = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.stage_group)
        return bool(told)

    def any_told(self, flag: bool) -> Callable[[], bool]:
        """Begin to tell all ranks whether it is set here. What is given waits until all have told, and says whether it is set on any; ranks
        call either as often as the others. Nothing is asked of the device."""
        if self.world == 1:
            return lambda: flag
        told = torch.tensor(float(flag))
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, async_op=True)

        def heard() -> bool:
            wait_for(work)
            return bool(told)

        return heard

    def from_last_stage(self, tensor: Tensor | None) -> Tensor:
        """A float32 tensor that the last stage of this pipeline has, on each of its stages.

        Args:
            tensor: None on the other stages, which need not know its shape.
        """
        if self.stages == 1:
            assert tensor is not None
            return tensor
        shape = torch.zeros(DIMS, dtype=torch.int64, device=self.device)
        if tensor is not None:
            shape[: tensor.ndim] = torch.tensor(tensor.shape)
        source = dist.get_global_rank(self.stage_group, self.stages - 1)
        dist.broadcast(shape, source, group=self.stage_group)
        if tensor is None:
            tensor = torch.empty([n for n in shape.tolist() if n], device=self.device)
        whole = tensor.contiguous()
        dist.broadcast(whole, source, group=self.stage_group)
        return whole

    def mean_over_replicas(self, parameters: Sequence[Tensor], chunk: int = 1 << 26) -> None:
        """Give each parameter the mean of its gradient over the replicas, in flat chunks of about ``chunk`` bytes.

        In other memory: what a gradient lies in may also hold one that the backward pass still needs. Gradients of sharded weights are
        means already: FSDP takes them as it shares them out.
        """
        if self.replicas == 1:
            return
        for group in _chunks([p for p in parameters if not isinstance(p, DTensor)], chunk):
            flat = torch.cat([p.grad.reshape(-1) for p in group if p.grad is not None])
            dist.all_reduce(flat, group=self.replica_group)
            flat /= self.replicas
            for p, mean in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.grad = mean.view_as(p)


def wait_for(work: Any) -> None:
    """Wait for what was begun with other ranks; who looks at this one's stack sees by this function that it waits for them."""
    work.wait()


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
def open_mesh(config: MeshConfig, agreed: Mapping[str, Any] | None = None) -> Iterator[Mesh]:
    """Join the run's processes; leaves the group on the way out.

    Without torchrun's variables this is a world of one on gloo with an in-process store: no port is opened,
    which is what native Windows needs.

    Args:
        agreed: what must be the same on every rank, such as the whole config, as JSON.

    Raises:
        ConfigError: on every rank, when ranks differ in ``agreed``, or the number of processes is not stages x replicate x shard;
            when a process has no device.
        DiffpipeError: when the processes do not find each other.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    with ended_with_torchrun() if launched else nullcontext():
        yield from _opened(config, agreed, rank, world, launched)


def _opened(config: MeshConfig, agreed: Mapping[str, Any] | None, rank: int, world: int, launched: bool) -> Iterator[Mesh]:
    device = _device(int(os.environ.get("LOCAL_RANK", 0)) if launched else 0)
    store = _meet() if launched else OwnStore()
    _compare(store, rank, world, {"mesh": config.model_dump(mode="json"), **(agreed or {})})
    wanted = config.stages * config.replicate * config.shard
    if world != wanted:
        raise ConfigError(
            f"{world} process{'es' if world > 1 else ''} for stages {config.stages} x replicate {config.replicate} x shard {config.shard}",
            where="mesh",
            expected=f"{wanted} process{'es' if wanted > 1 else ''}",
            fix=f"start with torchrun --nproc_per_node={wanted}, or change mesh.stages, mesh.replicate or mesh.shard",
        )
    nccl = launched and device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device if nccl else None, store=store, rank=rank, world_size=world)
    try:
        yield laid_out(config, device, "cuda" if device.type == "cuda" and launched else "cpu", store)
    finally:
        dist.destroy_process_group()


def laid_out(config: MeshConfig, device: torch.device, kind: str, store: Store) -> Mesh:
    """This rank's place in the process group that there is, of stages x replicate x shard ranks.

    Args:
        kind: of the devices that ranks send from.
    """
    axes = init_device_mesh(kind, (config.stages, config.replicas), mesh_dim_names=("stage", "replica"))
    finer: DeviceMesh | None = None
    if config.shard > 1:
        whole = init_device_mesh(kind, (config.stages, config.replicate, config.shard), mesh_dim_names=("stage", "replicate", "shard"))
        finer = whole["replicate", "shard"] if config.replicate > 1 else whole["shard"]
    return Mesh(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        stage=axes.get_local_rank("stage"),
        stages=config.stages,
        replica=axes.get_local_rank("replica"),
        replicas=config.replicas,
        shard=axes.get_local_rank("replica") % config.shard,
        shards=config.shard,
        device=device,
        stage_group=axes.get_group("stage"),
        replica_group=axes.get_group("replica"),
        store=store,
        axes=finer,
    )


def _meet() -> Store:
    """The store in which the processes find each other.

    Where torchrun gives one to all of its starts, each has its own names there. Where each start has its own store
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE), agents may count starts differently: one that was replaced begins at 0.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
    except (dist.DistError, ValueError, OSError) as fault:
        raise DiffpipeError(
            f"rank {os.environ['RANK']} does not reach the others at {address}: {str(fault).splitlines()[0]}",
            where="MASTER_ADDR, MASTER_PORT",
            expected="the address of the first machine, and a port that is free there and open to the others",
            fix="start with torchrun, with another --master_port where one is in use",
        ) from fault
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _compare(store: Store, rank: int, world: int, own: Mapping[str, Any]) -> None:
    """Raise on every rank where ``own`` is not the same on all, before anything waits for what another never does."""
    if world == 1:
        return
    store.set(f"agreed/{rank}", json.dumps(own))
    told: list[Mapping[str, Any]] = []
    for each in range(world):
        try:
            told.append(json.loads(store.get(f"agreed/{each}")))
        except dist.DistError as fault:
            raise DiffpipeError(
                f"rank {each} of {world} was not heard of: {str(fault).splitlines()[0]}",
                where="mesh",
                expected=f"{world} processes within {MEETING.total_seconds() / 60:g} minutes",
                fix="see what that rank says, and that torchrun was started on every machine",
            ) from fault
    store.set(f"compared/{rank}", "")
    lines = [f"rank {each}: {k} is {b!r}, not {a!r}" for each, other in enumerate(told) for k, a, b in differences(told[0], other)]
    if lines:
        with suppress(dist.DistError):  # the store may end with this process: not before the others have read
            store.wait([f"compared/{each}" for each in range(world)], timedelta(seconds=20))
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ConfigError(
            "ranks do not agree with rank 0\n" + "\n".join(f"  {line}" for line in lines[:8]) + more,
            where="mesh",
            expected="the same config and versions on every machine",
            fix="give every process the same config file and --set, and install the same versions",
        )


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found",
            where="mesh",
            expected="one process per GPU",
            fix="lower --nproc_per_node and mesh.stages, mesh.replicate or mesh.shard, or make more GPUs visible",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
