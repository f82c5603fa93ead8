"""Carries tensors between the device and host memory, both ways beside the computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffpipe.pipeline.memory.host import HostMemory


class Ferry:
    """Copies to the device on one stream and from it on another.

    Device memory belongs to the computation's own stream: for copies to fill when all that is queued is done, and free when what
    left it has arrived. Of what leaves, no more than one group is under way.

    Args:
        device: CUDA, or the CPU, where the same copies are made at once.
        memory: where what leaves the device goes.
        streams: torch's module of the device's streams and events.
    """

    def __init__(self, device: torch.device, memory: HostMemory, streams: Any) -> None:
        self.device, self.memory, self.streams = device, memory, streams
        self.into, self.out = streams.Stream(device), streams.Stream(device)
        self.leaving: tuple[Any, list[Tensor]] = (streams.Event(), [])

    def bring(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Copies on the device, to be used once the event has happened."""
        places = [torch.empty_like(host, device=self.device) for host in hosts]
        self.into.wait_stream(self._current())
        with self.streams.stream(self.into):
            for place, host in zip(places, hosts, strict=True):
                place.copy_(host, non_blocking=True)
        return places, end_of(self.into, self.streams)

    def send(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
        """Copy what is queued to be computed into host memory; what is brought from there later waits for it."""
        self._current().wait_event(self.leaving[0])
        self.out.wait_stream(self._current())
        with self.streams.stream(self.out):
            for tensor, host in zip(tensors, hosts, strict=True):
                host.copy_(tensor, non_blocking=True)
        event = end_of(self.out, self.streams)
        self.into.wait_event(event)
        self.leaving = (event, list(tensors))

    def host_like(self, tensor: Tensor) -> Tensor:
        """Host memory for a tensor."""
        return self.memory.like(tensor)

    def settle(self) -> None:
        """Wait until all that was sent has arrived."""
        self.streams.synchronize(self.device)
        self.leaving = (self.leaving[0], [])

    def _current(self) -> Any:
        return self.streams.current_stream(self.device)


def end_of(stream: Any, streams: Any) -> Any:
    """An event that happens when all that is queued on a stream now is done.

    Args:
        streams: torch's module of the device's streams and events.
    """
    event = streams.Event()
    event.record(stream)
    return event
