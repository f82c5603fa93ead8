"""Steps a unit's weights as soon as its backward pass is over, so that no gradient outlives it; optimizer state waits on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.optim.apart import only

SMALL = 4096  # elements below which a state tensor stays where it is


class Release:
    """The optimizer, a unit at a time.

    Args:
        optimizer: of all trained weights.
        average: replaces gradients by their mean over the replicas.
        device: CUDA, or the CPU, where the same is done without streams.
    """

    def __init__(self, optimizer: Optimizer, average: Callable[[Sequence[Tensor]], None], device: torch.device) -> None:
        self.optimizer, self.average, self.device = optimizer, average, device
        self.cuda = device.type == "cuda"
        self.into: Any = torch.cuda.Stream(device) if self.cuda else None
        self.out: Any = torch.cuda.Stream(device) if self.cuda else None
        self.hosts: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.come: dict[nn.Parameter, Any] = {}  # events of states on their way to the device
        self.leaving: tuple[Any, list[Tensor]] = (None, [])  # states on their way to the host
        self.squares: list[Tensor] = []

    def begin(self) -> None:
        """A step begins."""
        self.squares = []

    def bring(self, parameters: Sequence[nn.Parameter]) -> None:
        """A unit's backward pass begins: its optimizer state is needed when it is over."""
        if not self.cuda:
            return
        current = torch.cuda.current_stream(self.device)
        for p in parameters:
            state = self.optimizer.state.get(p, {})
            # Memory of the computation's own stream, for copies to fill when all that is queued now is done.
            places = {k: torch.empty_like(v, device=self.device) for k, v in state.items() if _moves(v)}
            self.into.wait_stream(current)
            with torch.cuda.stream(self.into):
                for k, place in places.items():
                    place.copy_(state[k], non_blocking=True)
                    state[k] = place
                self.come[p] = torch.cuda.Event()
                self.come[p].record(self.into)

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """A unit's backward pass is over, its weights are on the device: move them, and send their state away."""
        moving = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in moving if p.grad is not None]
        self.average(gradients)
        self.squares += [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients]
        if self.cuda:
            for p in parameters:
                if p in self.come:
                    torch.cuda.current_stream(self.device).wait_event(self.come.pop(p))
        with only(self.optimizer, moving):
            self.optimizer.step()
        for p in moving:
            p.grad = None
        if self.cuda:
            self._send_away(parameters)

    def square(self) -> Tensor:
        """The squared norm of all gradients that were released in this step, in float32."""
        return torch.stack(self.squares).sum() if self.squares else torch.zeros((), device=self.device)

    def settle(self) -> None:
        """Wait until all state is where ``optimizer.state`` says."""
        if self.cuda:
            self.out.synchronize()
            self.leaving = (None, [])

    def _send_away(self, parameters: Sequence[nn.Parameter]) -> None:
        current = torch.cuda.current_stream(self.device)
        event, _ = self.leaving
        if event is not None:
            current.wait_event(event)  # what the unit before left may be used again
        self.out.wait_stream(current)
        gone = []
        with torch.cuda.stream(self.out):
            for p in parameters:
                state, hosts = self.optimizer.state.get(p, {}), self.hosts.setdefault(p, {})
                for k, value in state.items():
                    if not _moves(value):
                        continue
                    if k not in hosts:
                        hosts[k] = torch.empty_like(value, device="cpu", pin_memory=True)
                    hosts[k].copy_(value, non_blocking=True)
                    state[k] = hosts[k]
                    gone.append(value)
            event = torch.cuda.Event()
            event.record(self.out)
        # A state that comes back waits for its copy to the host.
        self.into.wait_event(event)
        self.leaving = (event, gone)


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() >= SMALL
