"""Captures the passes of a step as a CUDA graph, and replays them: the host launches one graph in the place of thousands of kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffpipe.errors import ConfigError, causes
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.memory.layer import MemoryLayer

MOST = 64  # kinds of steps that are captured: each graph takes memory, on the host and on the device
TRIED = 4 * MOST  # kinds of steps that are looked at


def check_captured(captures: bool, model: DiffusionModel, device: torch.device) -> None:
    """Raise where ``memory.cuda_graphs`` asks for what there cannot be.

    Raises:
        ConfigError: with why.
    """
    if not captures:
        return
    if device.type != "cuda":
        raise ConfigError(f"true, on {device.type}", where="memory.cuda_graphs", expected="a CUDA device", fix="set it to false")
    if model.waits:
        raise ConfigError(
            f"true, where each pass of {model.name} copies between host and device",
            where="memory.cuda_graphs",
            expected="false",
            fix="set it to false",
        )


def spare_workspace() -> None:
    """Have cuBLAS' wide products do without a workspace, before the first of the process. Those that share out their work as they go
    count in it from zero, which is a node of its own in a graph before each of them: no kernel may begin there while the one before
    ends, and the host takes a hundred milliseconds in the place of four to launch a graph of nine thousand nodes."""
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")  # torch reads it once; what a user set stays


@dataclass
class Outcome:
    """What a step's passes leave beside gradients.

    Attributes:
        losses: each microbatch's share of the step's loss.
        by_sample: by microbatch, the losses of its samples.
    """

    losses: list[Tensor]
    by_sample: dict[int, Tensor]


Passes = Callable[[Any], Outcome]


@dataclass
class Captured:
    """A graph, with the tensors that it reads and writes.

    Attributes:
        after: what lies on the device behind it, as ``MemoryLayer.state`` has it.
        held: the most that the device held while it was captured, in bytes: of what it takes when it is replayed, torch counts nothing.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    outcome: Outcome
    gradients: dict[nn.Parameter, Tensor]
    after: Hashable
    held: int

    def replay(self, inputs: Sequence[Any]) -> Outcome:
        """The step for other inputs; gradients are in ``.grad``."""
        for place, given in zip(self.inputs, inputs, strict=True):
            if isinstance(place, Tensor):
                place.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        return self.outcome


class Kinds:
    """The kinds of steps that were queued, and which of them may be captured.

    A kind of step is the shapes of what goes in and what lies on the device before. It may be captured once it has been run and steps are
    known to come back to what it found: by then all is compiled and the order in which weights come is known. Where weights lie may
    differ from step to step and come back after a few.

    Args:
        captured: those that are.

    Attributes:
        trained: by kind, the parameters that had gradients.
        behind: by what lay on the device before a step, what lay there after it.
        gives_up: whether no more are captured, for there are too many.
    """

    def __init__(self, captured: Sized) -> None:
        self.trained: dict[Hashable, list[nn.Parameter]] = {}
        self.behind: dict[Hashable, Hashable] = {}
        self.captured, self.gives_up = captured, False

    def note(self, kind: Hashable, before: Hashable, after: Hashable, trained: list[nn.Parameter]) -> None:
        """A step has been queued."""
        if len(self.trained) < TRIED and len(self.captured) < MOST:
            self.trained[kind], self.behind[before] = trained, after
        else:
            self.gives_up = True

    def may_be_captured(self, kind: Hashable, before: Hashable) -> bool:
        """Whether a step that would be queued now may be."""
        return kind in self.trained and len(self.captured) < MOST and self._returns(before)

    def _returns(self, state: Hashable) -> bool:
        """Whether steps come back to what lay on the device, as far as they are known."""
        met, at = set(), state
        while at in self.behind and at not in met:
            met.add(at)
            at = self.behind[at]
        return at == state and at in met

    def complaint(self) -> str | None:
        """Why steps are queued in the place of being replayed, once there are too many kinds of them."""
        if not self.gives_up:
            return None
        many = len(self.behind) > MOST // 2
        why = "where streamed weights lie differs from step to step; try another memory.room" if many else "there are many buckets"
        return f"memory.cuda_graphs: {len(self.captured)} kinds of steps are replayed, all others are queued as without it: {why}"


class Replays:
    """Runs steps of training that one process takes alone.

    Args:
        parameters: that may have gradients.

    Attributes:
        gradients: where all graphs leave them: each with tensors of its own would hold as much again.
        held: of the last step, if it was replayed, as ``Captured`` has it; else 0.
    """

    def __init__(self, memory: MemoryLayer, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.memory, self.parameters, self.device = memory, parameters, device
        # All of its steps, those too that are not captured: autograd adds gradients up on the stream where a weight was first used.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.captured: dict[Hashable, Captured] = {}
        self.kinds = Kinds(self.captured)
        self.held = 0

    def run(self, inputs: Any, kind: Hashable, passes: Passes) -> Outcome:
        """A step.

        Args:
            inputs: tensors on the device, in any structure.
            kind: what else tells steps apart.

        Raises:
            ConfigError: where the passes cannot be captured.
        """
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outcome = self._run(inputs, kind, passes)
        here.wait_stream(self.stream)
        return outcome

    def _run(self, inputs: Any, kind: Hashable, passes: Passes) -> Outcome:
        leaves, tree = tree_flatten(inputs)
        before = self.memory.state()
        key = (tree, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves), before, kind)
        if key not in self.captured:
            if not self.kinds.may_be_captured(key, before):
                self.held, outcome = 0, passes(inputs)
                self.kinds.note(key, before, self.memory.state(), [p for p in self.parameters if p.grad is not None])
                return outcome
            copied = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            self.captured[key] = self._capture(copied, tree, passes, self.kinds.trained[key])
        found = self.captured[key]
        self.held = found.held
        for stream in self.memory.side_streams():
            self.stream.wait_stream(stream)  # copies of a step that was queued may still be under way
        outcome = found.replay(leaves)
        self.memory.assume(found.after)
        return outcome

    def _capture(self, inputs: list[Any], tree: Any, passes: Passes, trained: Sequence[nn.Parameter]) -> Captured:
        graph, beside = torch.cuda.CUDAGraph(), self.memory.side_streams()
        torch.cuda.synchronize(self.device)
        self.memory.forget_events()  # a graph cannot wait for what happened outside
        try:
            # Other threads may make page-locked memory meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                for stream in beside:
                    stream.wait_stream(self.stream)
                if added := {p: self.gradients[p] for p in trained if p in self.gradients}:
                    torch._foreach_zero_(list(added.values()))
                    for parameter, gradient in added.items():
                        parameter.grad = gradient
                outcome = passes(tree_unflatten(inputs, tree))
                for stream in beside:
                    self.stream.wait_stream(stream)
        except RuntimeError as fault:
            found = list(causes(fault))
            if any(isinstance(cause, torch.OutOfMemoryError) for cause in found):
                raise
            told = str(found[-1]).strip().partition("\n")[0]  # torch's schedules tell of the stage first
            raise ConfigError(
                f"a step that cannot be captured ({told})", where="memory.cuda_graphs", expected="false", fix="set it to false"
            ) from fault
        self.memory.forget_events()  # nor what runs outside for what happens in a graph
        gradients = {p: p.grad for p in trained if p.grad is not None}
        self.gradients.update(gradients)
        return Captured(graph, inputs, outcome, gradients, self.memory.state(), torch.cuda.max_memory_allocated(self.device))
