"""The memory layer of a stage: what is done to its units, from the inside out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.config.schema import MemoryConfig
from diffpipe.errors import ConfigError
from diffpipe.pipeline.memory.compiling import compiled
from diffpipe.pipeline.memory.ferry import Ferry
from diffpipe.pipeline.memory.offload import Offload
from diffpipe.pipeline.memory.recompute import recompute
from diffpipe.pipeline.memory.release import Release
from diffpipe.pipeline.memory.saved import Packer, saving
from diffpipe.pipeline.memory.staging import Staging
from diffpipe.pipeline.memory.stream import Home, Stream, streamed, watch


class MemoryLayer:
    """What a stage keeps, recomputes and moves.

    Made in two steps, since weights are read in between: the homes of streamed weights come before, ``wrap`` after. A unit's
    forward becomes, from the inside out: recomputed or compiled with that, its saved activations moved, its weights brought.

    Args:
        units: the stage's units, on meta.
        streams: torch's module of the device's streams and events.
    """

    def __init__(self, config: MemoryConfig, units: list[nn.Module], device: torch.device, streams: Any = None) -> None:
        self.config, self.units, self.device = config, units, device
        self.streams = streams or torch.get_device_module(device)
        self.pinned = config.pin and device.type == "cuda"
        self.homes: dict[int, Home] = {}
        self.stream: Stream | None = None
        self.offload: Offload | None = None
        self._choose()

    def _choose(self) -> None:
        config = self.config
        numbers = chosen(len(self.units), config.swap)
        self.homes |= streamed(self.units, [n for n in numbers if n not in self.homes], self.pinned)
        self.homes = {n: self.homes[n] for n in numbers}
        self.offload = Offload(self.device, int(config.offload_threshold * (1 << 20)), self.streams) if config.offload else None

    @property
    def order(self) -> str:
        return order_of(self.config)

    def change(self, config: MemoryConfig) -> None:
        """Go on by another section, with the weights as they are; nothing of a step may be left."""
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
            self.stream = Stream(self.homes, self.device, room, staging, self.streams)
        for number, unit in enumerate(self.units):
            forward: Callable[..., Any] = unit.forward
            policy = self.config.recompute if number % self.config.recompute_every == 0 else "none"
            if self.config.compile:
                forward = compiled(forward, policy)
            elif policy != "none":
                forward = recompute(forward, policy)
            streams = self.stream if number in self.homes else None
            if streams is not None or self.offload is not None:
                forward = saving(forward, partial(_packers, streams, self.offload))
            if streams is not None:
                forward = watch(forward, partial(streams.enter, number))
            unit.forward = forward  # the instance's: a wrapping module would rename every parameter

    @property
    def trains(self) -> bool:
        """Whether weights that train stream: they are stepped in the backward pass."""
        return any(home.trained for home in self.homes.values())

    def release_with(self, optimizer: Optimizer, average: Callable[[Sequence[Tensor]], None]) -> Release:
        """Step streamed weights in the backward pass from now on.

        Args:
            average: replaces gradients by their mean over the replicas.
        """
        release = Release(optimizer, average, Ferry(self.device, self.pinned, self.streams))
        if self.stream is not None and self.trains:
            self.stream.release = release
        return release

    def settle(self) -> None:
        """Have all trained weights and their optimizer state where parameters and optimizer say, between two steps."""
        if self.stream is not None and self.stream.release is not None:
            self.stream.settle()
            self.stream.release.settle()

    def begin(self, microbatches: int) -> None:
        """A step of training begins, or of evaluation where no gradients are asked for."""
        if self.stream is not None:
            training = torch.is_grad_enabled()
            self.stream.begin((training, microbatches))
            if self.stream.release is not None and training:
                self.stream.release.begin(microbatches)
        if self.offload is not None:
            self.offload.begin()

    def end(self) -> None:
        """The step's work is queued."""
        if self.stream is not None:
            self.stream.end()


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
