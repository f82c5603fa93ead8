"""Times parts of a step on a device without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch


class Clock:
    """Adds up the time between ``start`` and ``stop``; on CUDA with events, so that it never waits for the device.

    Of what is captured as a CUDA graph it takes no time: events in a graph tell none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []
        self.begun: Any = None

    def _now(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def start(self) -> None:
        if self.begun is None and not (self.cuda and torch.cuda.is_current_stream_capturing()):
            self.begun = self._now()

    def stop(self) -> None:
        if self.begun is not None:
            self.spans.append((self.begun, self._now()))
            self.begun = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """From ``start`` to ``stop``."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def take(self) -> float:
        """Seconds since the last call; the device must have finished what was timed."""
        self.stop()
        spans, self.spans = self.spans, []
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in spans)
