"""Runs a step's microbatches through the stages in torch's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from diffpipe.config.schema import MemoryConfig
from diffpipe.models.base import Targets
from diffpipe.pipeline.attention import Attention
from diffpipe.pipeline.averaging import Averaging
from diffpipe.pipeline.cut import Border, Probe
from diffpipe.pipeline.kept import Kept
from diffpipe.pipeline.lockstep import Lockstep
from diffpipe.pipeline.memory.layer import MemoryLayer
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.shard import Shards, hand_over, stand_in
from diffpipe.pipeline.stage import Stage, StepInputs

Microbatches = list[tuple[dict[str, Any], Targets]]
NOTHING = Border((), None, ())


class Pipeline:
    """All stages of one replica, as seen from one of them.

    torch's stage and schedule are made anew where shapes change. Their metadata is given, so no extra pass is ever run to find it.

    Attributes:
        shares: on the last stage, what each microbatch of the last step added to its loss.
        trained: by the name of each parameter that trains, what an optimizer steps for it.
    """

    def __init__(
        self, stage: Stage, mesh: Mesh, probe: Probe, memory: MemoryLayer, attention: Attention, shards: Shards | None = None
    ) -> None:
        self.stage, self.mesh, self.probe, self.memory, self.attention, self.shards = stage, mesh, probe, memory, attention, shards
        self.shares: list[Tensor] = []
        self.kept = Kept[Schedule1F1B | ScheduleGPipe]()
        self.trained = {name: stand_in(p) for name, p in stage.part.model.named_parameters() if p.requires_grad}
        if shards is not None:
            stage.on_last_backward = shards.last
        self._set_order()

    def change_memory(self, config: MemoryConfig) -> None:
        """Go on by another memory section, after a step that did not end."""
        self.stage.inputs = StepInputs()
        self.memory.change(config)
        self._set_order()

    def _set_order(self) -> None:
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
        return self._run(microbatches, lambda schedule, **given: schedule.step(**given))

    @cached_property
    def averaging(self) -> Averaging:
        """That of whole weights. Made with the first step: by then it is known which are stepped, and averaged, in the backward pass."""
        apart = self.memory.stepped_early()
        whole = [p for p in self.stage.part.model.parameters() if p.requires_grad and p not in apart and not isinstance(p, DTensor)]
        return Averaging(whole if self.mesh.replicas > 1 else [], self.mesh.replica_group)

    def _backward_passes(self, microbatches: int) -> int:
        """How many of a step end at a parameter; 0 where a step may be begun again by this rank alone."""
        if self.memory.config.on_oom == "adapt":
            return 0
        return 1 if self.lockstep is not None else microbatches

    def losses(self) -> Tensor:
        """Of each sample of the step that ``train`` ran, in order, on the last stage; of none on the others."""
        parts = [self.stage.losses[number] for number in sorted(self.stage.losses)]
        return torch.cat(parts) if parts else torch.empty(0, device=self.mesh.device)

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """All gradients of this rank, averaged over the replicas, and summed over the stages where several hold a parameter; and those of
        them that no earlier stage holds.

        What steps for a sharded parameter has the memory of its gradient from here on.
        """
        self.averaging.finish()
        part = self.stage.part
        own: list[Tensor] = []
        counted: list[Tensor] = []
        for name, parameter in part.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in part.repeated and self.mesh.stages > 1:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.mesh.sum_over_stages(parameter.grad)
            if parameter.grad is not None:
                own.append(parameter.grad)
                counted += [parameter.grad] if part.first or name not in part.repeated else []
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
        made, said = self.stage.predictions, self.stage.shortage
        self.stage.predictions, self.stage.shortage = {}, None
        if self.mesh.any_partner(said is not None):
            self.memory.settle()  # it was left in the middle of a step
            raise torch.OutOfMemoryError(said or "another stage has no memory left")
        return self.mesh.from_last_stage(torch.cat([made[number] for number in sorted(made)]) if made else None)

    def _set_mode(self, training: bool) -> None:
        if self.stage.training != training:  # which goes through thousands of modules
            self.stage.train(training)

    def _run(self, microbatches: Microbatches, run: Callable[..., Any]) -> Tensor:
        mesh, last = self.mesh, self.mesh.stage == self.mesh.stages - 1
        borders = self.probe.borders(microbatches[0][0])
        before = borders[mesh.stage - 1] if mesh.stage else NOTHING
        after = NOTHING if last else borders[mesh.stage]
        unused = [self.probe.unused(inputs) for inputs, _ in microbatches]
        moved = [_move(m, mesh.device) for m in microbatches]
        instead = (after.tensors or (torch.empty((), device="meta"),)) if not moved[0][1] and self.shards is None else None
        self.stage.inputs = StepInputs(moved, before.layout, before.ragged, after.ragged, unused, instead)
        self.stage.losses = {}
        self.memory.begin(len(microbatches))
        with self.shards.step() if self.shards is not None else nullcontext():
            if self.lockstep is not None and len(microbatches) > 1:
                losses = self._together(len(microbatches))
            else:
                losses = self._by_schedule(len(microbatches), before, after, run)
        self.memory.end()
        self.stage.inputs = StepInputs()
        self.shares = [loss.detach() for loss in losses] if last else []
        return torch.stack(self.shares).sum() if last else torch.zeros((), device=mesh.device)

    def _by_schedule(self, count: int, before: Border, after: Border, run: Callable[..., Any]) -> list[Tensor]:
        """Each microbatch through all units; the losses on the last stage."""
        last = self.mesh.stage == self.mesh.stages - 1
        kind = Schedule1F1B if count >= self.mesh.stages else ScheduleGPipe

        def make() -> Schedule1F1B | ScheduleGPipe:
            # scale_grads would divide what earlier steps left in .grad; the last stage divides its loss itself.
            return kind(self._torch_stage(before, after), count, loss_fn=lambda loss, number: loss, scale_grads=False)

        numbers = torch.arange(count)
        losses: list[Tensor] = []
        with self.kept.of((count, before, after, torch.is_grad_enabled()), make) as schedule:
            run(schedule, target=numbers if last else None, losses=losses if last else None, return_outputs=False, microbatch=numbers)
        return losses

    def _together(self, count: int) -> list[Tensor]:
        """Each unit for all microbatches, where one stage holds the whole model."""
        assert self.lockstep is not None
        # Around all of them: contexts that calls enter and leave by turns must find the same outside.
        with self.stage.precision():
            losses = self.lockstep.run([partial(self.stage, microbatch=torch.tensor([i])) for i in range(count)])
        if torch.is_grad_enabled():
            torch.stack(losses).sum().backward()
        return losses

    def _torch_stage(self, before: Border, after: Border) -> PipelineStage:
        return PipelineStage(
            self.stage,
            self.mesh.stage,
            self.mesh.stages,
            self.mesh.device,
            input_args=before.tensors,
            output_args=after.tensors or torch.empty((), device="meta"),
            group=self.mesh.stage_group,
        )


def _move(microbatch: tuple[dict[str, Any], Targets], device: torch.device) -> tuple[dict[str, Any], Targets]:
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, microbatch)
