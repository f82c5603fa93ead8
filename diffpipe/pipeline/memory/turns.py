"""Follows a step from unit to unit: weights are brought when one is entered, and those that train stepped when it is left."""

from __future__ import annotations

import torch

from diffpipe.pipeline.memory.release import Release
from diffpipe.pipeline.memory.stream import Stream


class Turns:
    """Which unit a step is at.

    Attributes:
        stream: brings the weights of units that stream.
        release: steps units in the backward pass.
    """

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.release: Release | None = None
        self.inside: int | None = None
        self.backward = False  # whether the backward pass has begun of the unit

    def begin(self, microbatches: int) -> None:
        """A step of training begins, or of evaluation where no gradients are asked for."""
        self.inside, training = None, torch.is_grad_enabled()
        if self.stream is not None:
            self.stream.begin((training, microbatches))
        if self.release is not None and training:
            self.release.begin(microbatches)

    def enter(self, unit: int, backward: bool) -> None:
        """What is queued from here on is a unit's forward pass, or its backward pass."""
        if self.inside != unit:
            self.leave()
            self.inside, self.backward = unit, False
        if self.stream is not None and unit in self.stream.homes:
            self.stream.enter(unit, backward)
        if backward:
            self.backward = True
            if self.release is not None:
                self.release.enter(unit)

    def leave(self) -> None:
        """The work of the unit that was entered last is queued."""
        if self.inside is None:
            return
        unit, self.inside = self.inside, None
        stepped = self.backward and self.release is not None and self.release.leave(unit)
        if self.stream is not None and unit in self.stream.homes:
            self.stream.leave(stepped)

    def end(self) -> None:
        """All of the step is queued."""
        self.leave()
        if self.stream is not None:
            self.stream.end()
