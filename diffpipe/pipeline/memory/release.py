"""Steps weights a unit at a time, so that optimizer state can wait on the host, and in the backward pass, so that gradients go early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.optim.apart import only
from diffpipe.pipeline.memory.ferry import Ferry

SMALL = 4096  # elements below which a state tensor stays on the device


class Release:
    """The optimizer, a unit at a time.

    What is stepped in the backward pass cannot be taken back: where a gradient is not finite the run must end, and go on from what was
    saved before.

    Args:
        optimizer: of all trained weights.
        average: gives weights the means of their gradients over the replicas.
        ferry: carries state, and gradients that wait for other microbatches.
        units: the trained weights of each unit, by number.
        early: units that are stepped as soon as their last backward pass is over.
        away: units whose state waits on the host.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        average: Callable[[Sequence[Tensor]], None],
        ferry: Ferry,
        units: Mapping[int, Sequence[nn.Parameter]],
        early: Collection[int],
        away: Collection[int],
    ) -> None:
        self.optimizer, self.average, self.ferry = optimizer, average, ferry
        self.units, self.early, self.away = units, early, away
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

    def enter(self, unit: int) -> None:
        """A microbatch's backward pass through a unit begins."""
        if unit not in self.early:
            return
        waiting = [p for p in self.units[unit] if p in self.waiting]
        if waiting:
            # Added to where they left off, so that sums are those of gradients that had stayed.
            places, event = self.ferry.bring([self.gradients[p] for p in waiting])
            self._wait(event)
            for p, place in zip(waiting, places, strict=True):
                p.grad = place
            self.waiting.difference_update(waiting)
        self.passes[unit] += 1
        if self.passes[unit] == self.microbatches:
            self._bring_state(unit)

    def leave(self, unit: int) -> bool:
        """The backward passes so far are queued, with the weights on the device: step if there are no more, or keep the gradients.

        Returns:
            Whether the weights were stepped.
        """
        moving = self._moving(unit) if unit in self.early else []
        if not moving:
            return False
        if self.passes[unit] < self.microbatches:
            for p in moving:
                if p not in self.gradients:
                    self.gradients[p] = self.ferry.host_like(p)
            self.ferry.send([_gradient(p) for p in moving], [self.gradients[p] for p in moving])
            self.waiting.update(moving)
            for p in moving:
                p.grad = None
            return False
        self.average(moving)
        norms = torch._foreach_norm([_gradient(p) for p in moving], dtype=torch.float32)
        self.squares.append(torch.stack(norms).square().sum())
        self._step(unit)
        return True

    def step_rest(self) -> None:
        """Step what was not stepped in the backward pass; no gradient is left."""
        late = [unit for unit in self.away if unit not in self.early]
        for unit in late[:1]:
            self._bring_state(unit)
        for unit, following in zip_longest(late, late[1:]):
            if following is not None:
                self._bring_state(following)
            self._step(unit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def waits_on_host(self) -> set[nn.Parameter]:
        """Weights whose state is there between steps."""
        return {p for unit in self.away for p in self.units[unit]}

    def square(self) -> Tensor:
        """The squared norm of all gradients that were released in this step, in float32."""
        return torch.stack(self.squares).sum() if self.squares else torch.zeros((), device=self.ferry.device)

    def settle(self) -> None:
        """Wait until all state is where ``optimizer.state`` says."""
        self.ferry.settle()

    def _moving(self, unit: int) -> list[nn.Parameter]:
        return [p for p in self.units[unit] if p.grad is not None]

    def _step(self, unit: int) -> None:
        if unit in self.come:
            self._wait(self.come.pop(unit))
        moving = self._moving(unit)
        if moving:
            with only(self.optimizer, moving):
                self.optimizer.step()
        for p in moving:
            p.grad = None
        if unit in self.away:
            self._send_state(unit)

    def _bring_state(self, unit: int) -> None:
        """Have a unit's optimizer state on the device when it is stepped."""
        if unit not in self.away:
            return
        found = [(state, k) for p in self.units[unit] for state in [self.optimizer.state.get(p, {})] for k in state]
        found.sort(key=itemgetter(1))
        # A resumed run has all of it on the host, where its parameters lie between steps; counts of steps stay there.
        found = [(s, k) for s, k in found if _moves(s[k]) or (isinstance(s[k], Tensor) and s[k].ndim and s[k].device != self.ferry.device)]
        places, self.come[unit] = self.ferry.bring([s[k] for s, k in found])
        for (state, key), place in zip(found, places, strict=True):
            state[key] = place

    def _send_state(self, unit: int) -> None:
        found = [(p, key, value) for p in self.units[unit] for key, value in self.optimizer.state.get(p, {}).items() if _moves(value)]
        found.sort(key=itemgetter(1))  # entries of one name may lie side by side
        for p, key, value in found:
            kept = self.states.setdefault(p, {})
            if key not in kept:
                kept[key] = self.ferry.host_like(value)
            self.optimizer.state[p][key] = kept[key]
        self.ferry.send([value for _, _, value in found], [self.states[p][key] for p, key, _ in found])

    def _wait(self, event: Any) -> None:
        self.ferry.streams.current_stream(self.ferry.device).wait_event(event)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() >= SMALL
