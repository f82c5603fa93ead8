"""Runs a step's microbatches through the stages in torch's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from diffpipe.config.schema import MemoryConfig
from diffpipe.models.base import Targets
from diffpipe.pipeline.attention import Attention
from diffpipe.pipeline.averaging import Averaging
from diffpipe.pipeline.clock import Clock
from diffpipe.pipeline.crossing import CrossingStage
from diffpipe.pipeline.cut import NOTHING, Border, Probe, joined
from diffpipe.pipeline.kept import Kept
from diffpipe.pipeline.lockstep import Lockstep
from diffpipe.pipeline.memory.layer import MemoryLayer
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.replay import Outcome, Replays
from diffpipe.pipeline.shard import Shards, hand_over, stand_in
from diffpipe.pipeline.stage import Stage, StepInputs

Microbatches = list[tuple[dict[str, Any], Targets]]
OF_SPANS = {  # by what ``mesh.schedule`` calls them: those that take several spans of a stage, or one
    "eager-1f1b": ScheduleInterleaved1F1B,  # of one span it is no other
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """All stages of one replica, as seen from one of them.

    torch's stages and schedule are made anew where shapes change. Their metadata is given, so no extra pass is ever run to find it.

    Args:
        spans: one for each span that this rank holds, in order.
        order: of the passes, as ``mesh.schedule`` has it.

    Attributes:
        module: all that this rank holds, under the model's names; not for running.
        clock: time spent in this rank's forward and backward passes.
        shares: on the last stage, what each microbatch of the last step added to its loss.
        trained: by the name of each parameter that trains, what an optimizer steps for it.
        replays: runs steps that are captured; None before the first, and where none are.
    """

    def __init__(
        self,
        spans: Sequence[Stage],
        order: str,
        mesh: Mesh,
        probe: Probe,
        memory: MemoryLayer,
        attention: Attention,
        shards: Sequence[Shards] = (),
    ) -> None:
        self.spans, self.order, self.mesh, self.probe, self.memory, self.attention = spans, order, mesh, probe, memory, attention
        self.shards, self.clock = shards, Clock(mesh.device)
        self.shares: list[Tensor] = []
        self.kept = Kept[Any]()
        self.replays: Replays | None = None
        self.module = joined([stage.part for stage in spans])
        self.trained = {name: stand_in(p) for name, p in self.module.named_parameters() if p.requires_grad}
        for stage, own in zip(spans, shards, strict=bool(shards)):
            stage.on_last_backward = own.last
        self._set_order()

    def change_memory(self, config: MemoryConfig) -> None:
        """Go on by another memory section, after a step that did not end."""
        for stage in self.spans:
            stage.inputs = StepInputs()
        self.memory.change(config)
        self._set_order()

    def _set_order(self) -> None:
        self.replays = None
        self.lockstep: Lockstep | None = None
        if self.memory.order == "layer" and self.mesh.stages == 1:
            self.lockstep = Lockstep()
            for unit in self.memory.units:
                unit.forward = self.lockstep.stopping(unit.forward)

    def train(self, microbatches: Microbatches) -> Tensor:
        """Forward and backward of one step; gradients add up in ``.grad``, and are then for ``gradients`` to take.

        Returns:
            The loss, the mean over microbatches, on the last stage; 0 on the others.
        """
        self._set_mode(training=True)
        self.averaging.begin(self._backward_passes(len(microbatches)))
        if self.memory.config.cuda_graphs and self.replays is None:
            self.replays = Replays(self.memory, [p for p in self.module.parameters() if p.requires_grad], self.mesh.device)
        return self._run(microbatches, lambda schedule, **given: schedule.step(**given))

    def held(self) -> int:
        """The most that this rank has held on its CUDA device since its peak was reset, in bytes; of a step that was replayed, what it held
        when it was captured."""
        return max(torch.cuda.max_memory_allocated(self.mesh.device), self.replays.held if self.replays is not None else 0)

    @cached_property
    def averaging(self) -> Averaging:
        """That of whole weights. Made with the first step: by then it is known which are stepped, and averaged, in the backward pass."""
        apart = self.memory.stepped_early()
        whole = [p for p in self.module.parameters() if p.requires_grad and p not in apart and not isinstance(p, DTensor)]
        return Averaging(whole if self.mesh.replicas > 1 else [], self.mesh.replica_group)

    def _backward_passes(self, microbatches: int) -> int:
        """How many of a step end at a parameter; 0 where a step may be begun again by this rank alone, or they cannot be told so."""
        several = len(self.spans) > 1 and self._repeated()  # passes of different spans end there
        if self.memory.config.on_oom == "adapt" or several or self.order == "zero-bubble":
            return 0
        return 1 if self.lockstep is not None else microbatches

    def _repeated(self) -> set[str]:
        """Names of parameters that every stage holds."""
        return {name for stage in self.spans for name in stage.part.repeated}

    def losses(self) -> Tensor:
        """Of each sample of the step that ``train`` ran, in order, on the last stage; of none on the others."""
        losses = self.spans[-1].losses
        parts = [losses[number] for number in sorted(losses)]
        return torch.cat(parts) if parts else torch.empty(0, device=self.mesh.device)

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """All gradients of this rank, averaged over the replicas, and summed over the stages where several hold a parameter; and those of
        them that no earlier stage holds.

        What steps for a sharded parameter has the memory of its gradient from here on.
        """
        self.averaging.finish()
        repeated = self._repeated()
        own: list[Tensor] = []
        counted: list[Tensor] = []
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in repeated and self.mesh.stages > 1:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.mesh.sum_over_stages(parameter.grad)
            if parameter.grad is not None:
                own.append(parameter.grad)
                counted += [parameter.grad] if self.mesh.stage == 0 or name not in repeated else []
                hand_over(parameter, self.trained[name])
        return own, counted

    @torch.no_grad()
    def evaluate(self, microbatches: Microbatches) -> Tensor:
        """The loss as in ``train``, without dropout and without gradients."""
        self._set_mode(training=False)
        return self._run(microbatches, lambda schedule, **given: schedule.eval(**given))

    @torch.no_grad()
    def predict(self, microbatches: Sequence[dict[str, Any]]) -> Tensor:
        """What the model gives for inputs of one shape, without dropout and without gradients; all ranks of a pipeline call it.

        Returns:
            The first of its outputs, float32, of all microbatches along the first dim; on every stage.

        Raises:
            torch.OutOfMemoryError: on every stage, where the memory of any ran out; all can go on. With weights that are shared among
                ranks it cannot be met, and is raised on the stage alone.
        """
        self._set_mode(training=False)
        self._run([(inputs, []) for inputs in microbatches], lambda schedule, **given: schedule.eval(**given))
        made, said = self.spans[-1].predictions, next((stage.shortage for stage in self.spans if stage.shortage), None)
        for stage in self.spans:
            stage.predictions, stage.shortage = {}, None
        if self.mesh.any_partner(said is not None):
            self.memory.settle()  # it was left in the middle of a step
            raise torch.OutOfMemoryError(said or "another stage has no memory left")
        return self.mesh.from_last_stage(torch.cat([made[number] for number in sorted(made)]) if made else None)

    def _set_mode(self, training: bool) -> None:
        for stage in self.spans:
            if stage.training != training:  # which goes through thousands of modules
                stage.train(training)

    def _run(self, microbatches: Microbatches, run: Callable[..., Any]) -> Tensor:
        mesh, last = self.mesh, self.mesh.stage == self.mesh.stages - 1
        borders = [NOTHING, *self.probe.borders(microbatches[0][0]), NOTHING]
        unused = [self.probe.unused(inputs) for inputs, _ in microbatches]
        moved = [_move(m, mesh.device) for m in microbatches]
        bare = not moved[0][1] and not self.shards  # without targets nothing is trained, and where memory runs out other stages are told

        def passes(moved: Microbatches) -> Outcome:
            for number, stage in self._numbered():
                before, after = borders[number], borders[number + 1]
                instead = (after.tensors or (torch.empty((), device="meta"),)) if bare else None
                stage.inputs = StepInputs(moved, before.layout, before.ragged, after.ragged, unused, instead)
                stage.losses = {}
            self.memory.begin(len(moved))
            with ExitStack() as around:
                for shards in self.shards:
                    around.enter_context(shards.step())
                if self.lockstep is not None and len(moved) > 1:
                    losses = self._together(len(moved))
                else:
                    losses = self._by_schedule(len(moved), borders, run)
            self.memory.end()
            for stage in self.spans:
                stage.inputs = StepInputs()
            return Outcome([loss.detach() for loss in losses], self.spans[-1].losses)

        if self.replays is not None and torch.is_grad_enabled():
            outcome = self.replays.run(moved, (tuple(unused), self.attention.cudnn), passes)
            self.spans[-1].losses = outcome.by_sample
        else:
            outcome = passes(moved)
        self.shares = outcome.losses if last else []
        return torch.stack(self.shares).sum() if last else torch.zeros((), device=mesh.device)

    def _numbered(self) -> list[tuple[int, Stage]]:
        """What this rank holds, with its numbers in the whole pipeline."""
        return [(self.mesh.stage + i * self.mesh.stages, stage) for i, stage in enumerate(self.spans)]

    def _by_schedule(self, count: int, borders: Sequence[Border], run: Callable[..., Any]) -> list[Tensor]:
        """Each microbatch through all units; the losses on the last stage."""
        last = self.mesh.stage == self.mesh.stages - 1
        own = self._numbered()
        several = OF_SPANS.get(self.order)
        behind = 2 * self.mesh.stages if several else None

        def make() -> tuple[Any, list[Any]]:
            stages: list[Any] = [self._torch_stage(stage, number, borders[number], borders[number + 1], behind) for number, stage in own]
            # scale_grads would divide what earlier steps left in .grad; the last stage divides its loss itself.
            given: dict[str, Any] = {"loss_fn": lambda loss, number: loss, "scale_grads": False}
            if several is not None:
                return (several if torch.is_grad_enabled() else ScheduleLoopedBFS)(stages, count, **given), stages
            all_ahead = self.order == "gpipe" or count < self.mesh.stages
            return (ScheduleGPipe if all_ahead else Schedule1F1B)(stages[0], count, **given), stages

        numbers = torch.arange(count)
        losses: list[Tensor] = []
        crossed = [border for number, _ in own for border in borders[number : number + 2]]
        with self.kept.of((count, torch.is_grad_enabled(), *crossed), make) as (schedule, stages):
            run(schedule, target=numbers if last else None, losses=losses if last else None, return_outputs=False, microbatch=numbers)
            for stage in stages:
                stage.settle()
        return losses

    def _together(self, count: int) -> list[Tensor]:
        """Each unit for all microbatches, where one stage holds the whole model."""
        assert self.lockstep is not None
        # Around all of them: contexts that calls enter and leave by turns must find the same outside.
        (stage,) = self.spans
        with stage.precision():
            losses = self.lockstep.run([partial(stage, microbatch=torch.tensor([i])) for i in range(count)])
        if torch.is_grad_enabled():
            torch.stack(losses).sum().backward()
        return losses

    def _torch_stage(self, stage: Stage, number: int, before: Border, after: Border, behind: int | None) -> CrossingStage:
        return _Timed(
            self.clock,
            stage,
            number,
            len(self.spans) * self.mesh.stages,
            self.mesh.device,
            input_args=before.tensors,
            output_args=after.tensors or torch.empty((), device="meta"),
            group=self.mesh.stage_group,
            behind=behind,
        )


class _Timed(CrossingStage):
    """Times what a schedule has this stage compute; none of it waits for others."""

    def __init__(self, clock: Clock, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = clock

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.running():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.running():
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.running():
            return super().backward_weight_one_chunk(*args, **kwargs)


def _move(microbatch: tuple[dict[str, Any], Targets], device: torch.device) -> tuple[dict[str, Any], Targets]:
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, microbatch)
