"""Keeps a step's schedule for the next step of the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The schedule of the last step.

    To make one takes milliseconds: torch's stages walk through their modules, and tell each other along the pipeline and back that
    their metadata is given.
    """

    def __init__(self) -> None:
        self.held: tuple[tuple[object, ...], T] | None = None

    @contextmanager
    def of(self, made_for: tuple[object, ...], make: Callable[[], T]) -> Iterator[T]:
        """For a step, the last one where that was made for the same, else a new one; that of a step that fails is not used again.

        Args:
            made_for: what it depends on; ranks of a pipeline must find it changed in the same steps.
        """
        held, self.held = self.held, None
        if held is None or held[0] != made_for:
            held = made_for, make()
        yield held[1]
        self.held = held
