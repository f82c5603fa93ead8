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
        back: the activation on the device again, once its pass has come back.
    """

    def __init__(self, offload: Offload, of: Pass, tensor: Tensor, host: Tensor) -> None:
        self.offload, self.of, self.host = offload, of, host
        self.shape, self.stride, self.dtype, self.bytes = tensor.shape, tensor.stride(), tensor.dtype, tensor.nbytes
        self.leaving: Tensor | None = tensor
        self.back: Tensor | None = None

    def restore(self) -> Tensor:
        """The activation on the device; those that are needed next are on their way from now on."""
        return self.offload.restore(self)

    def laid_out(self, flat: Tensor) -> Tensor:
        """A buffer's first bytes as the activation, its strides kept: kernels round by how their inputs lie."""
        return flat[: self.bytes].view(self.dtype).as_strided(self.shape, self.stride)


class Pass:
    """What one forward pass of a unit saves. It leaves together and comes back together: each wait costs the host as much as a kernel.

    Args:
        before: the forward pass before it, whose backward pass comes after.

    Attributes:
        written: the event after which all of it is in host memory; None until it is on its way.
        away: of what is to be brought back.
        arrived: the event after which what was brought back may be used; None once that is waited for.
    """

    def __init__(self, before: Pass | None) -> None:
        self.before = before
        self.away: list[weakref.ref[Kept]] = []
        self.written: Any = None
        self.arrived: Any = None

    def kept(self) -> list[Kept]:
        """What is still needed of what is to be brought back."""
        return [kept for reference in self.away if (kept := reference()) is not None]


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
        into: the stream on which they come back.

    Attributes:
        clock: time in which the computation waited for copies.
    """

    def __init__(self, device: torch.device, threshold: int, memory: HostMemory, streams: Any, into: Any) -> None:
        self.device, self.threshold, self.memory, self.streams = device, threshold, memory, streams
        self.out, self.back = streams.Stream(device), into
        self.returned: Any = None  # the event of the last activations' way back, if any are under way
        self.pool: dict[int, list[Tensor]] = {}
        self.last: Pass | None = None  # of the step
        self.held = 0  # bytes of host memory
        self.moved = 0  # bytes copied to the host
        self.clock = Clock(device)

    def begin(self) -> None:
        """A step begins; nothing that was saved before is needed any more."""
        self.last = None

    def side_streams(self) -> tuple[Any, ...]:
        """Those that copies to the host and back are made on."""
        return self.out, self.back

    def packer(self) -> Packer:
        """Moves what one forward pass of a unit saves, once the next begins or the backward pass does."""
        self._send()
        if self.last is not None and self.last.before is not None:
            self._let_go(self.last.before)
        self.last = mine = Pass(self.last)

        def pack(tensor: Tensor) -> Kept | None:
            if kept_alive(tensor) < self.threshold or tensor.device.type != self.device.type or not _dense(tensor) or _weight(tensor):
                return None
            kept = Kept(self, mine, tensor.detach(), self._take(tensor.nbytes))
            weakref.finalize(kept, self._give_back, kept.host)
            mine.away.append(weakref.ref(kept))
            return kept

        return pack

    def _send(self) -> None:
        """Start to copy to the host what the last forward pass saved."""
        if self.last is None or self.last.written is not None:
            return
        self.out.wait_stream(self.streams.current_stream(self.device))
        if self.returned is not None:
            self.out.wait_event(self.returned)  # until then what buffers held before is read
        with self.streams.stream(self.out):
            for kept in self.last.kept():
                assert kept.leaving is not None
                kept.laid_out(kept.host).copy_(kept.leaving, non_blocking=True)
                self.moved += kept.bytes
        self.last.written = end_of(self.out, self.streams)

    def _let_go(self, gone: Pass) -> None:
        """Free a pass's activations on the device for what is computed once their copies are done."""
        leaving = [kept for kept in gone.kept() if kept.leaving is not None]
        if leaving:
            self._wait(gone.written)
        for kept in leaving:
            kept.leaving = None

    def restore(self, kept: Kept) -> Tensor:
        """An activation on the device; what the pass before its own saved is fetched from now on."""
        self._send()
        mine = kept.of
        if kept.back is None:
            if not mine.away:
                mine.away = [weakref.ref(kept)]  # read a second time
            self._fetch(mine)
        if mine.arrived is not None:
            self._wait(mine.arrived)
            mine.arrived = None
            if mine.before is not None:
                self._fetch(mine.before)
        tensor, kept.back = kept.back, None  # the caller's now; it must not stay longer than it is used
        assert tensor is not None
        return tensor

    def _fetch(self, mine: Pass) -> None:
        """Start to bring a pass's activations back."""
        coming = mine.kept()
        mine.away = []
        if not coming:
            return
        mine.arrived = mine.written
        absent = [kept for kept in coming if kept.leaving is None]
        for kept in coming:
            # Of the last units, whose backward passes come first: still there.
            kept.back, kept.leaving = kept.leaving, None
        if not absent:
            return
        # Memory of the computation's own stream: free for the copy when all that is queued now is done, and again after its last use.
        flats = [torch.empty(kept.bytes, dtype=torch.uint8, device=self.device) for kept in absent]
        self.back.wait_stream(self.streams.current_stream(self.device))
        self.back.wait_event(mine.written)
        with self.streams.stream(self.back):
            for kept, flat in zip(absent, flats, strict=True):
                kept.back = kept.laid_out(flat)
                kept.back.copy_(kept.laid_out(kept.host), non_blocking=True)
        mine.arrived = self.returned = end_of(self.back, self.streams)

    def _wait(self, event: Any) -> None:
        self.clock.start()
        self.streams.current_stream(self.device).wait_event(event)
        self.clock.stop()

    def _take(self, count: int) -> Tensor:
        """A host buffer of at least ``count`` bytes, to be written on the way out."""
        size = -(-count // PAGE) * PAGE
        free = self.pool.setdefault(size, [])
        if free:
            return free.pop()
        self.held += size
        return self.memory.take(size)

    def _give_back(self, host: Tensor) -> None:
        """A buffer's activation is gone."""
        self.pool.setdefault(host.numel(), []).append(host)


def kept_alive(tensor: Tensor) -> int:
    """Bytes of memory that a saved tensor holds: the smaller of two halves of one result holds the memory of both."""
    return tensor.untyped_storage().nbytes()


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
