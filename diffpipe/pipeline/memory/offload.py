"""Keeps large saved activations in host memory between forward and backward, copied both ways beside the computation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from diffpipe.pipeline.clock import Clock
from diffpipe.pipeline.memory.ferry import end_of
from diffpipe.pipeline.memory.host import HostMemory
from diffpipe.pipeline.memory.saved import Packer

PAGE = 1 << 20  # bytes: host buffers are multiples of it, so that later activations fit into earlier ones' buffers


class Kept:
    """One activation in host memory, and on its way there or back on the device. Autograd owns it; its buffer is free when it goes.

    Attributes:
        leaving: the activation on the device, until its copy to the host is waited for.
        back: the activation on the device again, and the event of its copy.
    """

    def __init__(self, offload: Offload, unit: int, tensor: Tensor, host: Tensor, written: Any) -> None:
        self.offload, self.unit, self.host, self.written = offload, unit, host, written
        self.shape, self.stride, self.dtype, self.bytes = tensor.shape, tensor.stride(), tensor.dtype, tensor.nbytes
        self.leaving: Tensor | None = tensor
        self.back: tuple[Tensor, Any] | None = None

    def restore(self) -> Tensor:
        """The activation on the device; those that are needed next are on their way from now on."""
        return self.offload.restore(self)

    def laid_out(self, flat: Tensor) -> Tensor:
        """A buffer's first bytes as the activation, its strides kept: kernels round by how their inputs lie."""
        return flat[: self.bytes].view(self.dtype).as_strided(self.shape, self.stride)


class Offload:
    """Moves what units save for their backward passes to page-locked host memory, and brings it back before it is needed.

    Units' backward passes come in the reverse order of their forward passes, so that while one is computed the
    activations of the unit entered before it are fetched. While a unit is computed, copies of one unit's activations are under way,
    never of more: the computation waits for those before. So how much is held does not depend on how far the host runs ahead of the
    device, and all device memory is used in the order of the computation.

    Args:
        device: CUDA, or the CPU, where the same is done without streams.
        threshold: bytes of memory from which what holds it is moved.
        memory: where activations go.
        streams: torch's module of the device's streams and events.

    Attributes:
        clock: time in which the computation waited for copies.
    """

    def __init__(self, device: torch.device, threshold: int, memory: HostMemory, streams: Any = None) -> None:
        self.device, self.threshold, self.memory = device, threshold, memory
        self.streams = streams or torch.get_device_module(device)
        self.out, self.back = self.streams.Stream(device), self.streams.Stream(device)
        self.pool: dict[int, list[tuple[Tensor, Any]]] = {}
        self.units: list[list[weakref.ref[Kept]]] = []  # what each unit's forward pass saved, in the order of the passes
        self.held = 0  # bytes of host memory
        self.moved = 0  # bytes copied to the host
        self.clock = Clock(device)

    def begin(self) -> None:
        """A step begins; nothing that was saved before is needed any more."""
        self.units.clear()

    def packer(self) -> Packer:
        """Moves what one forward pass of a unit saves."""
        mine: list[weakref.ref[Kept]] = []
        number = len(self.units)
        if number > 1:
            for kept in _alive(self.units[number - 2]):
                self._let_go(kept)
        self.units.append(mine)

        def pack(tensor: Tensor) -> Kept | None:
            if kept_alive(tensor) < self.threshold or tensor.device.type != self.device.type or not _dense(tensor) or _weight(tensor):
                return None
            kept = self._away(tensor.detach(), number)
            mine.append(weakref.ref(kept))
            return kept

        return pack

    def _away(self, tensor: Tensor, unit: int) -> Kept:
        host, free = self._take(tensor.nbytes)
        kept = Kept(self, unit, tensor, host, self.streams.Event())
        self.moved += tensor.nbytes
        self.out.wait_stream(self.streams.current_stream(self.device))
        if free is not None:
            self.out.wait_event(free)
        with self.streams.stream(self.out):
            kept.laid_out(host).copy_(tensor, non_blocking=True)
        kept.written.record(self.out)
        weakref.finalize(kept, self._give_back, host)
        return kept

    def _let_go(self, kept: Kept) -> None:
        """Free an activation's memory on the device for what is computed once its copy is done."""
        if kept.leaving is not None:
            self.clock.start()
            self.streams.current_stream(self.device).wait_event(kept.written)
            self.clock.stop()
        kept.leaving = None

    def restore(self, kept: Kept) -> Tensor:
        """An activation on the device; what the unit before its own saved is fetched from now on."""
        self.clock.start()
        self._fetch(kept)
        assert kept.back is not None
        tensor, event = kept.back
        kept.back = None  # the caller's now; it must not stay longer than it is used
        self.streams.current_stream(self.device).wait_event(event)
        self.clock.stop()
        if 0 < kept.unit <= len(self.units):
            for other in _alive(self.units[kept.unit - 1]):
                self._fetch(other)
        return tensor

    def _fetch(self, kept: Kept) -> None:
        """Start to bring an activation back."""
        if kept.back is not None:
            return
        if kept.leaving is not None:
            # Of the last units, whose backward passes come first: still there.
            kept.back, kept.leaving = (kept.leaving, kept.written), None
            return
        # Memory of the computation's own stream: free for the copy when all that is queued now is done, and again after its last use.
        flat = torch.empty(kept.bytes, dtype=torch.uint8, device=self.device)
        self.back.wait_stream(self.streams.current_stream(self.device))
        self.back.wait_event(kept.written)
        with self.streams.stream(self.back):
            tensor = kept.laid_out(flat)
            tensor.copy_(kept.laid_out(kept.host), non_blocking=True)
        kept.back = (tensor, end_of(self.back, self.streams))

    def _take(self, count: int) -> tuple[Tensor, Any]:
        """A host buffer of at least ``count`` bytes, and the event after which it may be written."""
        size = -(-count // PAGE) * PAGE
        free = self.pool.setdefault(size, [])
        if free:
            return free.pop()
        self.held += size
        return self.memory.take(size), None

    def _give_back(self, host: Tensor) -> None:
        """A buffer's activation is gone: it may be written once what was queued to read it has done so."""
        self.pool.setdefault(host.numel(), []).append((host, end_of(self.back, self.streams)))


def kept_alive(tensor: Tensor) -> int:
    """Bytes of memory that a saved tensor holds: the smaller of two halves of one result holds the memory of both."""
    return tensor.untyped_storage().nbytes()


def _alive(references: list[weakref.ref[Kept]]) -> list[Kept]:
    return [kept for reference in references if (kept := reference()) is not None]


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its bytes, each once, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one, which stays on the device whatever is saved of it."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
