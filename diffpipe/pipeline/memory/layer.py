"""The memory layer of a stage: what is done to its units, from the inside out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.config.schema import MemoryConfig, OptimizerConfig
from diffpipe.errors import ConfigError
from diffpipe.pipeline.memory.compiling import run_by
from diffpipe.pipeline.memory.ferry import Ferry
from diffpipe.pipeline.memory.host import HostMemory
from diffpipe.pipeline.memory.offload import Offload
from diffpipe.pipeline.memory.release import Release
from diffpipe.pipeline.memory.saved import Packer, saving
from diffpipe.pipeline.memory.staging import Staging
from diffpipe.pipeline.memory.stream import Home, Stream, streamed, watch
from diffpipe.pipeline.memory.turns import Turns


class MemoryLayer:
    """What a stage keeps, recomputes and moves.

    Made in two steps, since weights are read in between: the homes of streamed weights come before, ``wrap`` after. A unit's
    forward becomes, from the inside out: recomputed or compiled with that, its saved activations moved, its weights brought.

    Args:
        units: the stage's units, on meta.
        stepping: how weights are stepped, and where the optimizer's state waits.
        streams: torch's module of the device's streams and events.
    """

    def __init__(
        self, config: MemoryConfig, units: list[nn.Module], device: torch.device, stepping: OptimizerConfig, streams: Any = None
    ) -> None:
        self.config, self.units, self.device, self.stepping = config, units, device, stepping
        self.streams = streams or torch.get_device_module(device)
        self.pinned = config.pin and device.type == "cuda"
        # Weights and activations come on one stream, as they are queued: what is needed first is not left behind what is brought ahead.
        self.into = self.streams.Stream(device)
        self.weights, self.activations = HostMemory(self.pinned), HostMemory(device.type == "cuda")
        self.homes: dict[int, Home] = {}
        self.stream: Stream | None = None
        self.turns = Turns()
        self.offload: Offload | None = None
        self._choose()

    def _choose(self) -> None:
        config = self.config
        numbers = chosen(len(self.units), config.swap)
        self.homes |= streamed(self.units, [n for n in numbers if n not in self.homes], self.weights)
        self.homes = {n: self.homes[n] for n in numbers}
        threshold = int(config.offload_threshold * (1 << 20))
        self.offload = Offload(self.device, threshold, self.activations, self.streams, self.into) if config.offload else None

    @property
    def order(self) -> str:
        return order_of(self.config)

    def change(self, config: MemoryConfig) -> None:
        """Go on by another section, with the weights as they are, after a step that did not end: its copies are waited for, which go from
        and to memory that others take now, and what frames of its fault held of it goes, for they may hold each other."""
        gc.collect()
        self.streams.synchronize(self.device)
        for home in self.homes.values():
            home.bind(home.views(home.flat))
        before, self.config, self.stream = self.homes, config, None
        for unit in self.units:
            del unit.forward
        self._choose()
        for number in before.keys() - self.homes.keys():
            before[number].bind([p.to(self.device) for p in before[number].parameters()])
        self.wrap()

    def wrap(self) -> None:
        """Put the policies around the units' forwards; the weights are read."""
        if self.homes:
            room = None if self.config.room is None else int(self.config.room * (1 << 20))
            staging = Staging() if self.device.type == "cuda" and not self.pinned else None
            told = self.config.compile  # what is computed again otherwise reads all
            self.stream = Stream(self.homes, self.device, room, staging, self.streams, told, self.into)
        self.turns.stream = self.stream
        for number, unit in enumerate(self.units):
            forward = run_by(unit, self.config, number)
            streams = self.stream if number in self.homes else None
            if streams is not None or self.offload is not None:
                forward = saving(forward, partial(_packers, streams, self.offload))
            if self.stream is not None or self.stepping.release:
                forward = watch(forward, partial(self.turns.enter, number))
            unit.forward = forward  # the instance's: a wrapping module would rename every parameter

    def release_with(self, optimizer: Optimizer, average: Callable[[Sequence[Tensor]], None]) -> Release:
        """Steps with the optimizer from now on: in the backward pass those units whose trained weights stream, or all that should.

        Args:
            average: replaces gradients by their mean over the replicas.
        """
        units = {number: [p for p in unit.parameters() if p.requires_grad] for number, unit in enumerate(self.units)}
        streaming = {number for number, home in self.homes.items() if home.trained}
        early = units.keys() if self.stepping.release else streaming
        away = units.keys() if self.stepping.offload else streaming
        ferry = Ferry(self.device, self.weights, self.streams)
        self.turns.release = Release(optimizer, average, ferry, units, early, away)
        return self.turns.release

    def stepped_early(self) -> set[nn.Parameter]:
        """Weights that are stepped in the backward pass."""
        release = self.turns.release
        return set() if release is None else {p for unit in release.early for p in release.units[unit]}

    def settle(self) -> None:
        """Have all weights and optimizer state where parameters and optimizer say, between two steps."""
        if self.stream is not None:
            self.stream.settle()
        if self.turns.release is not None:
            self.turns.release.settle()

    def state(self) -> Hashable:
        """What lies on the device of streamed weights: two steps that find the same copy the same."""
        return None if self.stream is None else self.stream.state()

    def assume(self, state: Any) -> None:
        """Go on from what ``state`` gave behind the passes that a graph has repeated."""
        if self.stream is not None:
            self.stream.assume(state)

    def side_streams(self) -> list[Any]:
        """The streams on which copies are made beside the passes."""
        return [side for mover in (self.stream, self.offload) if mover is not None for side in mover.side_streams()]

    def forget_events(self) -> None:
        """Wait for no copy of steps before, all of which the computation's stream has been told to wait for."""
        if self.stream is not None:
            self.stream.ready.clear()
        if self.offload is not None:
            self.offload.returned = None

    def stalled(self) -> float:
        """Seconds in which the computation waited for copies since the last call; the device must have finished."""
        return sum(mover.clock.take() for mover in (self.stream, self.offload) if mover is not None)

    def begin(self, microbatches: int) -> None:
        """A step of training begins, or of evaluation where no gradients are asked for."""
        self.turns.begin(microbatches)
        if self.offload is not None:
            self.offload.begin()

    def end(self) -> None:
        """The step's work is queued."""
        self.turns.end()


def chosen(count: int, swap: int | str) -> list[int]:
    """Numbers of the units of ``count`` whose weights stream: spread evenly, so that there is time to bring each.

    Args:
        swap: how many, or "all".

    Raises:
        ConfigError: when there are not so many.
    """
    number = count if swap == "all" else int(swap)
    if number > count:
        raise ConfigError(
            f"{number} units for a stage of {count}", where="memory.swap", expected=f"at most {count}, or all", fix="lower it"
        )
    return sorted({i * count // number for i in range(number)}) if number else []


def order_of(config: MemoryConfig) -> str:
    """What ``memory.order`` comes to, where one stage holds the whole model."""
    return config.order or ("layer" if config.swap and config.offload else "microbatch")


def _packers(stream: Stream | None, offload: Offload | None) -> list[Packer]:
    """Who is asked about what a unit saves; weights first, which must not be moved as activations."""
    return [each.packer() for each in (stream, offload) if each is not None]
