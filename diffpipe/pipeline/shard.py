"""Shares a part's weights among ranks by FSDP2: each keeps a shard of every weight, and a unit's are gathered where it is used."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from diffpipe.models.adapters import is_adapter
from diffpipe.pipeline.cut import Part

PIECE = re.compile(r"(.+)@(\d+)/\d+")


class Shards:
    """When a part's weights are gathered, and when its gradients are reduced, in a step of several microbatches.

    torch's pipelining has a policy of its own for a stage that is an FSDPModule: it keeps all of it gathered. So the part inside the
    stage is one, and the stage none.

    Args:
        part: on meta. Afterwards its weights are shards along their first dim; adapters, and what every part has, stay whole on every rank.
        mesh: the ranks that hold the part: an axis of shards, behind one of replicas where there are several.
        reshard: free a unit's weights behind each of its passes, and reduce gradients behind each microbatch's; else weights are
            gathered once a step, and gradients reduced once, behind the last microbatch.
    """

    def __init__(self, part: Part, mesh: DeviceMesh, reshard: bool) -> None:
        self.reshard = reshard
        # What every part has, several on this rank may hold together.
        whole = {p for name, p in part.model.named_parameters() if is_adapter(name) or p.ndim == 0 or name in part.repeated}
        modules = [*(part.model.get_submodule(unit) for unit in part.units), part]
        self.groups = [cast(FSDPModule, _sharded(module, mesh, reshard, whole)) for module in modules]
        *units, self.rest = self.groups
        # By default torch fetches by the order of the forward passes it has seen. Those of several microbatches follow each other, so
        # that behind the first unit it would fetch the last again. The rest of the part is there already.
        for before, unit in pairwise([self.rest, *units]):
            unit.set_modules_to_backward_prefetch([before])

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step; behind it every rank holds its shards alone."""
        with warnings.catch_warnings():
            # What leaves a unit may be a view. It is not changed in place, by which gradients would be lost.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            self._set(last=False)
            yield
        for group in self.groups:
            group.reshard()

    def last(self) -> None:
        """The backward pass of the step's last microbatch begins."""
        self._set(last=True)

    def _set(self, last: bool) -> None:
        for group in self.groups:
            group.set_reshard_after_backward(self.reshard or last, recurse=False)
            group.set_requires_gradient_sync(self.reshard or last, recurse=False)
            group.set_requires_all_reduce(last, recurse=False)
        self.rest.set_is_last_backward(last)


def _sharded(module: nn.Module, mesh: DeviceMesh, reshard: bool, whole: set[nn.Parameter]) -> nn.Module:
    return fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)  # pyright: ignore[reportReturnType]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that is sharded; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimizer steps for a parameter: this rank's shard of one that is sharded, as a plain tensor; any other itself."""
    return nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def hand_over(parameter: nn.Parameter, to: nn.Parameter) -> None:
    """Let the stand-in of a parameter have its gradient, if it has any elements, and the memory that its values lie in now."""
    if to is parameter or parameter.grad is None:
        return
    gradient = local(parameter.grad)
    to.data = local(parameter.detach())
    to.grad = gradient if gradient.numel() else None
    parameter.grad = None


def shard_of(whole: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """On the device, this rank's shard of a tensor where ``like`` is sharded; else all of the tensor."""
    if not isinstance(like, DTensor):
        return whole.to(device)
    axis = like.device_mesh.ndim - 1
    rows, shards = like.shape[0], like.device_mesh.size(axis)
    begin = min(like.device_mesh.get_local_rank(axis) * -(-rows // shards), rows)
    # A copy: a view would keep all of the tensor.
    return beside(whole.narrow(0, begin, like.to_local().shape[0]).to(device, copy=True), like)


def beside(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape of this rank's shard of ``like``, as the shard that it is; any other as it is."""
    if not isinstance(like, DTensor) or tensor.shape != like.to_local().shape:
        return tensor
    return DTensor.from_local(tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def piece_name(name: str, shard: int, shards: int) -> str:
    """What a shard of the tensor ``name`` is called in a file."""
    return f"{name}@{shard}/{shards}"


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of files by name, those that lie there in pieces put together; lazy ones stay lazy."""
    whole: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if piece := PIECE.fullmatch(name):
            pieces.setdefault(piece[1], {})[int(piece[2])] = tensor
        else:
            whole[name] = tensor
    return whole | {name: torch.cat([held[i] for i in sorted(held)]) for name, held in pieces.items()}


def gathered(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which all ranks that hold it ask for together; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype.itemsize > 1:
        return tensor.full_tensor()
    # As bytes: gloo carries no fp8.
    return beside(local(tensor).view(torch.uint8), tensor).full_tensor().view(tensor.dtype)  # pyright: ignore[reportAttributeAccessIssue]
