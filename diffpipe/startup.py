"""Times what comes before a run's first step is over, by phase."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter

import diffpipe
from diffpipe.metrics import StartRecord
from diffpipe.pipeline.mesh import Mesh


class Startup:
    """Laps of one rank, from when it first imported this package."""

    def __init__(self) -> None:
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.lapped = diffpipe.BEGAN
        self.over = False

    def lap(self, phase: str) -> None:
        """All since the last lap was of this phase."""
        now = perf_counter()
        self.phases[phase] += now - self.lapped
        self.lapped = now

    def ended(self, mesh: Mesh) -> StartRecord | None:
        """A step is over. The record at the first call, which all ranks make together; None at later ones."""
        if self.over:
            return None
        self.over = True
        self.lap("first step")
        return StartRecord(dict(zip(self.phases, mesh.largest(*self.phases.values()), strict=True)))
