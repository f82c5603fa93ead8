"""A stage on fake tensors: what its steps hold and how long they take, found without a weight and without its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from diffpipe.config.schema import Config, MemoryConfig
from diffpipe.flow import Key
from diffpipe.models.adapters import is_adapter
from diffpipe.models.base import DiffusionModel, Targets
from diffpipe.models.padding import processors
from diffpipe.optim.size import state_bytes
from diffpipe.pipeline.attention import packs
from diffpipe.pipeline.build import outline, parts_of, precision_of
from diffpipe.pipeline.cut import NOTHING, Fakes, Part, Probe, duplicate
from diffpipe.pipeline.memory.arena import Use, room_to_settle, steady_plans
from diffpipe.pipeline.memory.as_on_cuda import as_on_cuda
from diffpipe.pipeline.memory.cards import Card
from diffpipe.pipeline.memory.chunks import chunk
from diffpipe.pipeline.memory.compiled import Compiled
from diffpipe.pipeline.memory.estimate import Estimate, Moment, Peak, find_peak
from diffpipe.pipeline.memory.footprint import Footprint, measure
from diffpipe.pipeline.memory.host import HostMemory
from diffpipe.pipeline.memory.inference import measure_ahead
from diffpipe.pipeline.memory.layer import chosen, order_of
from diffpipe.pipeline.memory.ledger import Work, rounded
from diffpipe.pipeline.memory.quantize import quantize
from diffpipe.pipeline.memory.recompute import kind_of
from diffpipe.pipeline.memory.stream import Stream, streamed
from diffpipe.pipeline.memory.timeline import Recorder, Timeline, Visit
from diffpipe.pipeline.order import in_flight, passes_of
from diffpipe.pipeline.stage import sum_errors

CPU = torch.device("cpu")
PAGEABLE = 0.5  # rate of copies from memory that is not page-locked, in parts of that from memory that is
Dims = tuple[int, int, int]  # of a bucket: frames, height, width


@dataclass(frozen=True)
class Unit:
    """What one unit adds to whichever stage holds it; what lies before the units is counted to the first.

    Attributes:
        ahead, back: the work of a microbatch's passes.
        fixed: bytes of weights, gradients and optimizer state.
        saved: bytes that it keeps of each microbatch in flight.
        workspace: bytes that its passes take beside.
        sent: bytes that come out of it.
        parameters: bytes of its weights.
    """

    ahead: Work
    back: Work
    fixed: int
    saved: int
    workspace: int
    sent: int
    parameters: int


@dataclass(frozen=True)
class Residency:
    """Where a stage's weights lie.

    Attributes:
        resident: bytes of frozen ones on the device for good.
        trained: of those that train.
        optimizer: of its state on the device: that which waits on the host only while it is used, and that of the unit before still leaves.
        arena: bytes that streamed ones share.
        homes: bytes of the streamed ones, and of optimizer state, in host memory.
        moved: bytes copied to the device for one microbatch, when steps follow each other.
        stepped: bytes that go to the host in a step: of streamed weights that train, and of state that waits there.
        states: of the latter.
        gathered: of sharded weights those that are whole at once, and on their way to be.
        gradients: the most of them at once, where they are shared out; None where they stay as they come.
    """

    resident: int
    trained: int
    optimizer: int
    arena: int = 0
    homes: int = 0
    moved: int = 0
    stepped: int = 0
    states: int = 0
    gathered: int = 0
    gradients: int | None = None


class Rehearsal:
    """One stage of a config, rehearsed for a card.

    What depends on a bucket and a policy alone is found once, so that many settings of the memory section can be compared.

    Args:
        stage: its number.
    """

    def __init__(self, config: Config, model: DiffusionModel, stage: int, card: Card) -> None:
        self.config, self.model, self.stage, self.card = config, model, stage, card
        whole, spans = outline(config, model)
        for processor in processors(whole):
            processor.packs = packs(config.model.attention, getattr(torch, config.model.dtype), card.capability)
        self.fakes = Fakes(CPU)
        self.precision = precision_of(config, CPU)
        self.numbers = range(stage, len(spans), config.mesh.stages)
        twins = [Part(duplicate(whole), model.spec, *span, self.fakes) for span in spans[:-1][: self.numbers[-1] + 1]]
        for twin in twins:
            self.fakes.fill(twin)
        self.probe = Probe(twins, self.fakes, self.precision, model.spec.lengths)
        plain = "interleaved" if len(self.numbers) > 1 else "1f1b"
        schedule = plain if config.mesh.schedule == "auto" else config.mesh.schedule
        passes = passes_of(schedule, config.mesh.stages, len(self.numbers), config.batch.accumulate)[stage]
        self.in_flight = -(-in_flight(passes) // len(self.numbers))
        # What several spans hold is rehearsed as if a microbatch went through one right after the other.
        self.parts = parts_of(whole, model.spec, [spans[n] for n in self.numbers], self.fakes)
        self.holder = nn.ModuleList(self.parts)
        for part in self.parts:
            quantize(part.model, part.units, config.memory, model, card.multiplies_fp8)
        self.units = [part.model.get_submodule(unit) for part in self.parts for unit in part.units]
        for unit in self.units:
            chunk(unit, config.memory.feed_forward_chunks, config.memory.compile)
        self.fakes.fill(self.holder)
        self.holder.train()
        # As they are, for the recorder puts others in their places.
        self.plain = [duplicate(unit) for unit in self.units]
        self.recorder = Recorder(self.units, self.fakes, self.precision)
        self.timelines: dict[Dims, Timeline] = {}
        self.footprints: dict[Any, Footprint] = {}
        self.compiled: dict[Any, Compiled] = {}
        self.residencies: dict[Any, Residency] = {}
        self.peaks: dict[Any, Peak] = {}
        trained = [p for p in self.holder.parameters() if p.requires_grad]
        self.trained, self.state = sum(rounded(p.nbytes) for p in trained), state_bytes(config.optimizer, trained)

    def estimate(self, bucket: Dims, memory: MemoryConfig) -> Estimate:
        """What a step of a bucket holds and takes under a memory section whose ``swap`` is a number or "all"."""
        peak, held = self._peak(bucket, memory), self.residency(bucket, memory)
        count = self.config.batch.accumulate
        visits = 1 if self._together(memory) else count  # of each streamed unit, forward and backward
        link = self.card.link * (1 if memory.pin else PAGEABLE)
        weights, activations = visits * held.moved / 2 / link, count * peak.moved / self.card.link
        early = self._apart(memory, self.config.optimizer.release)
        passes = 0 if self._together(memory) else count - 1  # after which the gradients of these units wait on the host
        waiting = passes * sum(rounded(p.nbytes) for unit in early for p in self._trained(unit))
        states = held.states / link
        ahead = max(count * self.card.seconds(peak.ahead), weights, activations)
        there, home = weights + activations + waiting / link, (held.stepped + waiting) / link
        back = max(count * self.card.seconds(peak.back), there + (states if early else 0), home if early else 0)
        moment = peak.moment
        if held.gradients is not None:
            moment = replace(moment, gradients=min(moment.gradients, held.gradients))
        return Estimate(
            weights=held.resident,
            trained=held.trained,
            optimizer=held.optimizer,
            arena=held.arena,
            library=self.card.library,
            moment=moment,
            homes=held.homes,
            buffers=peak.held,
            to_device=visits * held.moved + count * peak.moved + waiting + held.states,
            to_host=count * peak.moved + waiting + held.stepped,
            seconds=ahead + back + (0 if early else states),
            gathered=held.gathered,
        )

    def residency(self, bucket: Dims, memory: MemoryConfig) -> Residency:
        """Where weights lie under a memory section whose ``swap`` is a number or "all"; the bucket is one that is trained."""
        key = (memory.swap, memory.room, memory.compile and self._policies(memory))
        if key not in self.residencies:
            self.residencies[key] = self._placed(self.timeline(bucket), memory)
        return self.residencies[key]

    @torch.no_grad()
    def prediction(self, microbatches: Sequence[dict[str, Any]], memory: MemoryConfig) -> Moment:
        """What ``Pipeline.predict`` of these inputs holds at most beside weights; the inputs themselves are left to the caller."""
        self.holder.eval()
        timeline = self._passed(microbatches[0], [])
        self.holder.train()

        def footprint(visit: Visit) -> Footprint:
            number, call = timeline.calls[visit.kind]
            key = (visit.kind, "prediction", memory.compile)
            if key not in self.footprints:
                self.footprints[key] = measure_ahead(self.plain[number], call, self.fakes, memory.compile)
            return self.footprints[key]

        return replace(find_peak(timeline, footprint, len(microbatches), len(microbatches)).moment, inputs=0)

    def between_steps(self, step: Estimate, memory: MemoryConfig) -> dict[str, int]:
        """What of a step's estimate is on the device when it is over, by name: no state that waits on the host, nothing gathered."""
        states = sorted(state_bytes(self.config.optimizer, self._trained(n)) for n in self._apart(memory, self.config.optimizer.offload))
        left = {"gathered weights": 0, "optimizer state": step.optimizer - sum(states[-2:]), "workspace": step.library}
        return {**step.always, **left}

    def policy(self, memory: MemoryConfig, unit: int) -> str:
        """What the backward pass of a unit of the stage computes again."""
        return memory.policy_of(unit, kind_of(self.plain[unit]))

    def _policies(self, memory: MemoryConfig) -> tuple[str, ...]:
        return tuple(self.policy(memory, unit) for unit in range(len(self.plain)))

    def inventory(self, bucket: Dims) -> list[Unit]:
        """The stage's units, as the config's memory section treats them."""
        timeline, memory = self.timeline(bucket), self.config.memory
        threshold = int(memory.offload_threshold * (1 << 20)) if memory.offload else None
        outside = {id(p): p for p in self.holder.parameters()}
        found: list[Unit] = []
        for visit in (e for e in timeline.ahead if isinstance(e, Visit)):
            taken = self._footprint(timeline, visit, self.policy(memory, visit.unit), threshold, memory.compile)
            own = list(self.units[visit.unit].parameters())
            for p in own:
                outside.pop(id(p), None)
            entering = sum(isinstance(x, Tensor) for x in timeline.calls[visit.kind][1].leaves)
            held = {visit.leaves[place] for place in taken.held}
            found.append(
                Unit(
                    ahead=taken.ahead,
                    back=taken.back,
                    fixed=self._fixed(own),
                    saved=taken.kept + sum(timeline.bytes.get(s, 0) for s in held),
                    workspace=max(taken.forward, taken.backward),
                    sent=sum(timeline.bytes.get(s, 0) for s in set(visit.leaves[entering:]) - set(visit.leaves[:entering])),
                    parameters=sum(p.nbytes for p in own),
                )
            )
        rest = list(outside.values())
        found[0] = replace(
            found[0],
            ahead=found[0].ahead + timeline.work,
            fixed=found[0].fixed + self._fixed(rest),
            parameters=found[0].parameters + sum(p.nbytes for p in rest),
        )
        return found

    def _fixed(self, parameters: Sequence[nn.Parameter]) -> int:
        shards = self.config.mesh.shard
        trained = [p for p in parameters if p.requires_grad]
        frozen = sum(rounded(p.nbytes) for p in parameters if not p.requires_grad) // shards
        held = 2 * sum(rounded(p.nbytes) for p in trained) + state_bytes(self.config.optimizer, trained)
        return frozen + held // (shards if self.config.adapter is None else 1)

    def _together(self, memory: MemoryConfig) -> bool:
        """Whether all microbatches pass a unit before any goes on."""
        return self.config.mesh.stages == 1 and order_of(memory) == "layer"

    def _in_flight(self, memory: MemoryConfig) -> int:
        """Microbatches whose activations this stage holds at once."""
        return self.config.batch.accumulate if self._together(memory) else self.in_flight

    def _peak(self, bucket: Dims, memory: MemoryConfig) -> Peak:
        threshold = int(memory.offload_threshold * (1 << 20)) if memory.offload else None
        together = self._together(memory)
        released = frozenset(self._apart(memory, self.config.optimizer.release))
        key = (bucket, self._policies(memory), threshold, memory.compile, together, released)
        if key not in self.peaks:
            timeline = self.timeline(bucket)

            def footprint(visit: Visit) -> Footprint:
                return self._footprint(timeline, visit, self.policy(memory, visit.unit), threshold, memory.compile)

            self.peaks[key] = find_peak(timeline, footprint, self._in_flight(memory), self.config.batch.accumulate, together, released)
        return self.peaks[key]

    def _footprint(self, timeline: Timeline, visit: Visit, policy: str, threshold: int | None, compiles: bool) -> Footprint:
        key = (visit.kind, policy, threshold, compiles)
        if key not in self.footprints:
            unit, call = self.plain[timeline.calls[visit.kind][0]], timeline.calls[visit.kind][1]
            if compiles:
                if visit.kind not in self.compiled:
                    self.compiled[visit.kind] = Compiled(unit, call, self.fakes)
                self.footprints[key] = self.compiled[visit.kind].footprint(policy, threshold)
            else:
                self.footprints[key] = measure(unit, call, self.fakes, policy, threshold)
        return self.footprints[key]

    def timeline(self, bucket: Dims) -> Timeline:
        if bucket not in self.timelines:
            self.timelines[bucket] = self._recorded(bucket)
        return self.timelines[bucket]

    def _recorded(self, bucket: Dims) -> Timeline:
        count = self.config.batch.micro
        row = self.model.blank(*bucket)
        inputs, targets = self.model.prepare(
            {n: t[None].expand(count, *t.shape) for n, t in row.items()}, [Key(0, 0, i, 0) for i in range(count)]
        )
        return self._passed(inputs, targets)

    def _passed(self, inputs: dict[str, Any], targets: Targets) -> Timeline:
        """The timeline of a microbatch; without targets its predictions leave the last stage."""
        borders = [NOTHING, *self.probe.borders(inputs)]
        fake = {n: self._fake(n, x) for n, x in inputs.items()}
        wanted = tree_map(lambda x: self.fakes.tensor(x) if isinstance(x, Tensor) else x, targets)
        payloads = [tuple(self.fakes.tensor(t) for t in borders[number].tensors) for number in self.numbers]
        given = [getattr(x, "twin", x) for x in tree_leaves((fake, wanted)) if isinstance(x, Tensor)]

        def forward() -> list[Tensor]:
            leaving: list[Tensor] = []
            for number, part, payload in zip(self.numbers, self.parts, payloads, strict=True):
                with self.precision():
                    sent, _ = as_on_cuda(part)(payload, borders[number].layout, fake)
                loss = self.config.objective
                leaving += [sum_errors(sent, wanted, loss.loss, loss.delta)] if part.last and wanted else sent
            return leaving

        timeline = self.recorder.record([*self.holder.parameters(), *self.holder.buffers()], given, forward)
        timeline.arriving = sum(rounded(t.nbytes) for payload in payloads for t in payload)
        return timeline

    def _fake(self, name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return self.fakes.known(torch.ones_like(x)) if name == self.model.spec.lengths else self.fakes.tensor(x)

    # -- weights -----------------------------------------------------------------------------------------------------

    def _placed(self, timeline: Timeline, memory: MemoryConfig) -> Residency:
        if self.config.mesh.shard > 1:
            return self._shared()
        numbers = chosen(len(self.units), memory.swap)
        streams = {id(p) for n in numbers for name, p in self.units[n].named_parameters() if not is_adapter(name)}
        frozen = [t for t in [*self.holder.parameters(), *self.holder.buffers()] if not t.requires_grad]
        resident = sum(rounded(t.nbytes) for t in frozen if id(t) not in streams)
        states = [state_bytes(self.config.optimizer, self._trained(n)) for n in self._apart(memory, self.config.optimizer.offload)]
        state, moving = self.state - sum(states) + sum(sorted(states)[-2:]), sum(states)
        if not numbers:
            return Residency(resident, self.trained, state, homes=moving, stepped=moving, states=moving)
        with self.fakes.mode:
            homes = streamed([duplicate(unit) for unit in self.units], numbers, HostMemory(pinned=False))
            stream = Stream(homes, CPU, None if memory.room is None else int(memory.room * (1 << 20)))
        ahead, back = ([e for e in events if isinstance(e, Visit) and e.unit in homes] for events in (timeline.ahead, timeline.back))
        if memory.compile:
            taken = {visit.unit: self._footprint(timeline, visit, self.policy(memory, visit.unit), None, compiles=True) for visit in ahead}
            stream.spare({unit: footprint.read for unit, footprint in taken.items()})
        visits = [*(Use(e.unit) for e in ahead), *(Use(e.unit, back=True) for e in back)]
        room = room_to_settle(visits, stream.sizes, stream.arena.numel(), {}, stream.parts())
        *_, steady = steady_plans(visits, stream.sizes, room, {}, stream.parts())
        stepped = sum(rounded(p.nbytes) for home in homes.values() for p in home.trained)
        return Residency(
            resident,
            self.trained - stepped,
            state,
            rounded(stream.arena.numel()),
            sum(h.flat.numel() for h in homes.values()) + moving,
            steady.moved,
            stepped + moving,
            moving,
        )

    def _shared(self) -> Residency:
        """Where weights lie that ranks share: a shard of each, and those whole that are gathered at once."""
        shards, reshard = self.config.mesh.shard, self.config.mesh.reshard
        shared = {id(p): rounded(p.nbytes) for name, p in self.holder.named_parameters() if not is_adapter(name)}
        units = sorted((sum(shared[id(p)] for p in unit.parameters() if id(p) in shared) for unit in self.units), reverse=True)
        most = sum(shared.values()) - (sum(units[2:]) if reshard else 0)
        trained = [p for p in self.holder.parameters() if p.requires_grad]
        frozen = [t for t in [*self.holder.parameters(), *self.holder.buffers()] if not t.requires_grad]
        whole = self.config.adapter is None  # what trains is shared too
        return Residency(
            resident=sum(shared[id(t)] // shards if id(t) in shared else rounded(t.nbytes) for t in frozen),
            trained=sum(shared[id(p)] // shards if id(p) in shared else rounded(p.nbytes) for p in trained),
            optimizer=self.state // shards if whole else self.state,
            gathered=most + units[0],  # the largest once more, as it arrives
            gradients=most + self.trained // shards if whole and reshard else None,
        )

    def _apart(self, memory: MemoryConfig, every: bool) -> Sequence[int]:
        """Units that are stepped on their own: all, or those whose trained weights stream."""
        if every:
            return range(len(self.units))
        return chosen(len(self.units), memory.swap) if self.config.adapter is None else []

    def _trained(self, unit: int) -> list[nn.Parameter]:
        return [p for p in self.units[unit].parameters() if p.requires_grad]


def largest(buckets: Sequence[Dims]) -> Dims:
    """The bucket that takes most memory: the one of most cells, which all that depends on a bucket rises with."""
    return max(buckets, key=lambda b: (b[0] * b[1] * b[2], b))
