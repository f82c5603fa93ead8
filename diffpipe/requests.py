"""What a run is asked to do while it trains: looked at once, behind every step, and agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Flag, auto
from functools import reduce
from operator import or_

from diffpipe.pipeline.mesh import Mesh


class Request(Flag):
    """What may be asked for; a run that stops writes a checkpoint first, one that quits does not."""

    CHECKPOINT = auto()
    STOP = auto()
    EXPORT = auto()
    QUIT = auto()


NOTHING = Request(0)


class Requests:
    """All who may ask, as one.

    Args:
        sources: each gives what was asked for since it was last called, on this rank; ranks may be asked for different things.
    """

    def __init__(self, mesh: Mesh, sources: Sequence[Callable[[], Request]]) -> None:
        self.mesh, self.sources = mesh, sources

    def agreed(self) -> Request:
        """What any rank was asked for since the last call, the same on every rank."""
        own = reduce(or_, (source() for source in self.sources), NOTHING)
        kinds = list(Request)
        flags = self.mesh.largest(*(float(kind in own) for kind in kinds))
        return reduce(or_, (kind for kind, flag in zip(kinds, flags, strict=True) if flag), NOTHING)
