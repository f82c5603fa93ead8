"""Carries tensors between the device and host memory, both ways beside the computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffpipe.pipeline.memory.host import HostMemory


class Ferry:
    """Copies to the device on one stream and from it on another.

    Device memory belongs to the computation's own stream: for copies to fill when all that is queued is done, and free when what
    left it has arrived. Of what leaves, no more than one group is under way. Tensors that lie side by side travel as one.

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
        runs = list(_side_by_side(hosts))
        spans = [_span(hosts[run]) for run in runs]
        flats = [torch.empty_like(span, device=self.device) for span in spans]
        self.into.wait_stream(self._current())
        with self.streams.stream(self.into):
            for flat, span in zip(flats, spans, strict=True):
                flat.copy_(span, non_blocking=True)
        places = [place for flat, run in zip(flats, runs, strict=True) for place in _parts(flat, hosts[run])]
        return places, end_of(self.into, self.streams)

    def send(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
        """Copy what is queued to be computed into host memory; what is brought from there later waits for it."""
        self._current().wait_event(self.leaving[0])
        self.out.wait_stream(self._current())
        with self.streams.stream(self.out):
            for run in _side_by_side(tensors, hosts):
                _span(hosts[run]).copy_(_span(tensors[run]), non_blocking=True)
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


def _side_by_side(*kinds: Sequence[Tensor]) -> Iterator[slice]:
    """Which of them lie one behind the other in one memory, in each sequence."""
    count = len(kinds[0])
    edges = [i for i in range(1, count) if not all(_behind(kind[i - 1], kind[i]) for kind in kinds)]
    return (slice(begin, end) for begin, end in pairwise([0, *edges, count]) if begin < end)


def _behind(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor begins where another ends, and not in memory that is there by chance."""
    begin, end = other.storage_offset() * other.itemsize, one.storage_offset() * one.itemsize + one.nbytes
    same = other.data_ptr() - begin == one.data_ptr() + one.nbytes - end
    return same and begin == end and one.is_contiguous() and other.is_contiguous()


def _span(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors that lie side by side, or the only one."""
    first, *others = tensors
    if not others:
        return first
    return first.view(-1).view(torch.uint8).as_strided((sum(t.nbytes for t in tensors),), (1,))


def _parts(span: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What ``_span`` made of such tensors, apart again."""
    if len(like) == 1:
        return [span]
    return [part.view(t.dtype).view(t.shape) for part, t in zip(span.split([t.nbytes for t in like]), like, strict=True)]
