"""Steps a unit's weights as soon as its last backward pass is over, so that no gradient outlives it; optimizer state waits on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.optim.apart import only
from diffpipe.pipeline.memory.ferry import Ferry

SMALL = 4096  # elements below which a state tensor stays on the device


class Release:
    """The optimizer, a unit at a time.

    A step cannot be taken back: where a gradient is not finite the run must end, and go on from what was saved before.

    Args:
        optimizer: of all trained weights.
        average: replaces gradients by their mean over the replicas.
        ferry: carries state, and gradients that wait for other microbatches.
    """

    def __init__(self, optimizer: Optimizer, average: Callable[[Sequence[Tensor]], None], ferry: Ferry) -> None:
        self.optimizer, self.average, self.ferry = optimizer, average, ferry
        self.states: dict[nn.Parameter, dict[str, Tensor]] = {}  # host memory of state
        self.gradients: dict[nn.Parameter, Tensor] = {}  # host memory of gradients
        self.waiting: set[nn.Parameter] = set()  # those whose gradients lie there
        self.come: dict[int, Any] = {}  # by unit, the event of its state on the way to the device
        self.passes: Counter[int] = Counter()  # by unit, the microbatches whose backward passes have begun
        self.microbatches = 1
        self.squares: list[Tensor] = []

    def begin(self, microbatches: int) -> None:
        """A step begins."""
        assert not self.waiting, "each unit has a backward pass for every microbatch"
        self.microbatches, self.squares = microbatches, []
        self.passes.clear()

    def enter(self, unit: int, parameters: Sequence[nn.Parameter]) -> None:
        """A microbatch's backward pass through a unit begins."""
        waiting = [p for p in parameters if p in self.waiting]
        if waiting:
            # Added to where they left off, so that sums are those of gradients that had stayed.
            places, event = self.ferry.bring([self.gradients[p] for p in waiting])
            self._wait(event)
            for p, place in zip(waiting, places, strict=True):
                p.grad = place
            self.waiting.difference_update(waiting)
        self.passes[unit] += 1
        if self.passes[unit] == self.microbatches:
            self._bring_state(unit, parameters)

    def leave(self, unit: int, parameters: Sequence[nn.Parameter]) -> bool:
        """The backward passes so far are queued, with the weights on the device: step if there are no more, or keep the gradients.

        Returns:
            Whether the weights were stepped.
        """
        moving = [p for p in parameters if p.grad is not None]
        if self.passes[unit] < self.microbatches:
            for p in moving:
                self.gradients.setdefault(p, self.ferry.host_like(p))
            self.ferry.send([_gradient(p) for p in moving], [self.gradients[p] for p in moving])
            self.waiting.update(moving)
        else:
            self._step(unit, moving)
        for p in moving:
            p.grad = None
        return bool(moving) and self.passes[unit] == self.microbatches

    def square(self) -> Tensor:
        """The squared norm of all gradients that were released in this step, in float32."""
        return torch.stack(self.squares).sum() if self.squares else torch.zeros((), device=self.ferry.device)

    def settle(self) -> None:
        """Wait until all state is where ``optimizer.state`` says."""
        self.ferry.settle()

    def _step(self, unit: int, moving: Sequence[nn.Parameter]) -> None:
        gradients = [_gradient(p) for p in moving]
        self.average(gradients)
        self.squares += [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients]
        self._wait(self.come.pop(unit))
        with only(self.optimizer, moving):
            self.optimizer.step()
        self._send_state(moving)

    def _bring_state(self, unit: int, parameters: Sequence[nn.Parameter]) -> None:
        """Have a unit's optimizer state on the device when its backward pass is over."""
        found = [(self.optimizer.state.get(p, {}), k) for p in parameters for k in self.optimizer.state.get(p, {})]
        # A resumed run has all of it on the host, where its parameters lie between steps; counts of steps stay there.
        found = [(s, k) for s, k in found if _moves(s[k]) or (isinstance(s[k], Tensor) and s[k].ndim and s[k].device != self.ferry.device)]
        places, self.come[unit] = self.ferry.bring([s[k] for s, k in found])
        for (state, key), place in zip(found, places, strict=True):
            state[key] = place

    def _send_state(self, parameters: Sequence[nn.Parameter]) -> None:
        tensors, hosts = [], []
        for p in parameters:
            state, kept = self.optimizer.state.get(p, {}), self.states.setdefault(p, {})
            for key, value in state.items():
                if _moves(value):
                    tensors.append(value)
                    kept[key] = kept[key] if key in kept else self.ferry.host_like(value)
                    hosts.append(kept[key])
                    state[key] = kept[key]
        self.ferry.send(tensors, hosts)

    def _wait(self, event: Any) -> None:
        self.ferry.streams.current_stream(self.ferry.device).wait_event(event)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() >= SMALL
