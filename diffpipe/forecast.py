"""What a run is expected to hold on its devices: chosen to fit before anything is loaded, compared with what it holds later."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf

import psutil
import torch

from diffpipe.config.schema import Config, MemoryConfig
from diffpipe.data.buckets import Bucket
from diffpipe.errors import DiffpipeError
from diffpipe.metrics import amount
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.memory.cards import Card, find_card
from diffpipe.pipeline.memory.decoding import Decoding, measure_decoding
from diffpipe.pipeline.memory.estimate import Estimate, Held
from diffpipe.pipeline.memory.planner import (
    choose,
    does_not_fit,
    exhausted,
    fewest_streamed,
    is_open,
    least,
    lower,
    preview_does_not_fit,
    too_much_for_the_host,
)
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.rehearsal import Dims, Rehearsal, largest
from diffpipe.prompts import Prompt
from diffpipe.sampling import first_asked

ERROR = 0.1  # part by which a prediction may be off: what is not chosen is refused only beyond it
MARGIN = 0.05  # part of the free memory that is left when settings are chosen to fill it
FREE = "what is free on the device"
SETTLED = 3  # the step of a bucket whose peak is told: optimizer state is there by then, and blocks are compiled


@dataclass(frozen=True)
class Foresight:
    """What the previews that take most hold on one stage.

    Attributes:
        bucket: of the prompt with most cells.
        sampling: at most while it is sampled, its guidance branches going through the stages.
        decoding: while the VAE decodes it; None on a stage that does not.
        vae: how the VAE goes about it.
        faults: why previews may be left out.
    """

    bucket: Bucket
    sampling: Held
    decoding: Held | None
    vae: Decoding | None
    faults: tuple[DiffpipeError, ...]

    def line(self) -> str:
        """What is held, with the part that is largest, for a person."""
        told = [("sampling", self.sampling)]
        if self.decoding is not None and self.vae is not None:
            told.append((f"decoding in tiles of {self.vae.tile} pixels" if self.vae.tile else "decoding", self.decoding))
        each = (f"{what} {amount(held.peak)} (most of it {held.most}, {amount(held.parts[held.most])})" for what, held in told)
        return f"previews of {self.bucket}: {', '.join(each)}"


class Forecast:
    """What one stage of a run will hold and take.

    Args:
        free: bytes that are free on the device; None where nothing limits the stage but ``memory.budget``.
        host: bytes of host memory that are free for this process; infinite where nothing limits them but ``memory.host_budget``.

    Attributes:
        config: the run's, with its memory section settled by ``settle``.
        reasons: by key of that section, why it is as it is, where it was chosen.
        previews: what they will hold, once ``foresee`` was asked.
    """

    def __init__(self, config: Config, model: DiffusionModel, stage: int, card: Card, free: int | None, host: float = inf) -> None:
        self.config, self.stage, self.free, self.host = config, stage, free, host
        self.model, self.rehearsal = model, Rehearsal(config, model, stage, card)
        self.reasons: dict[str, str] = {}
        self.dearest: Dims | None = None  # of the buckets that were settled for
        self.previews: Foresight | None = None

    @property
    def limit(self) -> tuple[int, str] | None:
        """Bytes that a step may hold, and whose limit that is."""
        memory, by_stage = self.config.memory, self.config.mesh.memory
        if by_stage is not None:
            return by_stage[self.stage], "mesh.memory"
        if memory.budget is not None:
            return memory.budget, "memory.budget"
        if self.free is None:
            return None
        if is_open(memory):
            return int(self.free * (1 - MARGIN)), f"{FREE} less {MARGIN:.0%}"
        return self.free, FREE

    @property
    def host_limit(self) -> tuple[float, str]:
        """Bytes that may be held in host memory, infinite where nothing limits them, and whose limit that is."""
        if self.config.memory.host_budget is not None:
            return self.config.memory.host_budget, "memory.host_budget"
        return self.host, "what is free for this process"

    def settle(self, buckets: Iterable[Bucket]) -> None:
        """Choose what the memory section leaves open, for the bucket that takes most.

        Raises:
            DiffpipeError: when that bucket cannot fit.
        """
        self.dearest = dearest = largest([dims(b) for b in buckets])
        if self.limit is None:
            return
        limit, whose = self.limit
        host, whose_host = self.host_limit
        where, judge = f"bucket {Bucket(*dearest)} on stage {self.stage}", self._judge(dearest)
        if not is_open(self.config.memory):
            estimate = judge(self.config.memory)
            if estimate.peak * (1 - ERROR) > limit:
                raise does_not_fit(where, estimate, limit, whose, self.config)
            if estimate.host * (1 - ERROR) > host:
                raise too_much_for_the_host(where, estimate, int(host), whose_host)
            return
        units, asked = len(self.rehearsal.units), self.config.memory
        if (self.config.adapter is None and self.config.optimizer.clip is not None) or self.config.mesh.shard > 1:
            # What trains is stepped where it streams, before the norm is known; and what is sharded does not stream.
            asked = asked.model_copy(update={"swap": 0})
        choice = choose(asked, units, limit, judge, host)
        if choice is None and host < inf and (wider := choose(asked, units, limit, judge)) is not None:
            raise too_much_for_the_host(where, wider.estimate, int(host), whose_host)
        if choice is None:
            tried = self.config.model_copy(update={"memory": exhausted(asked)})
            raise does_not_fit(where, least(asked, units, judge), limit, whose, tried)
        self.reasons = choice.reasons
        self.config = self.config.model_copy(update={"memory": choice.memory})

    def lower(self, bucket: Bucket) -> MemoryConfig | None:
        """Settle for less than what proved too much in steps of a bucket; None where nothing is left to lower."""
        settings = lower(self.config.memory, len(self.rehearsal.units), self._judge(dims(bucket)), self.host_limit[0])
        if settings is not None:
            self.config = self.config.model_copy(update={"memory": settings})
        return settings

    def of(self, bucket: Bucket) -> Estimate:
        """The estimate of a bucket's steps."""
        return self.rehearsal.estimate(dims(bucket), self.config.memory)

    def foresee(self, prompts: Sequence[Prompt], decodes: bool) -> None:
        """Find what previews will hold, with the settings that were settled for training: these stay as they are.

        The VAE takes the largest tiles that fit.

        Args:
            prompts: one at least.
            decodes: whether this stage does.

        Raises:
            DiffpipeError: when what is free does not do for them and the run would end there: where ranks share weights, a sample
                cannot be left out by one of them.
        """
        assert self.dearest is not None
        memory = self.config.memory
        number, prompt = _dearest(prompts)
        step = self.rehearsal.estimate(self.dearest, memory)
        lasting = self.rehearsal.between_steps(step, memory)
        self._foresee(number, prompt, decodes, lasting, _sampling(lasting, step.gathered, self._taken(prompt)))

    def settle_samples(self, prompts: Sequence[Prompt], decodes: bool) -> None:
        """Choose for samples alone how many units stream, where there is a budget or the choice is left, and find what they will hold.

        Nothing trains then: as few stream as it takes, whatever steps needed.

        Args:
            prompts, decodes: as of ``foresee``.

        Raises:
            DiffpipeError: as ``foresee`` does.
        """
        number, prompt = _dearest(prompts)
        size, taken = dims(prompt.bucket), self._taken(prompt)

        def lasting(memory: MemoryConfig) -> dict[str, int]:
            held = self.rehearsal.residency(size, memory)
            weights = {"weights": held.resident, "streamed weights": held.arena, "trained parameters": held.trained}
            return {**weights, "workspace": self.rehearsal.card.workspace}

        def sampling(memory: MemoryConfig) -> Held:
            return _sampling(lasting(memory), self.rehearsal.residency(size, memory).gathered, taken)

        memory, limit = self.config.memory, self.limit
        if is_open(memory):
            units = 0 if self.config.mesh.shard > 1 else len(self.rehearsal.units)  # what is sharded does not stream
            memory = fewest_streamed(memory, units, lambda each: limit is None or sampling(each).peak <= limit[0])
            self.reasons = {"swap": f"sampling {prompt.bucket} holds {amount(sampling(memory).peak)}"}
            self.config = self.config.model_copy(update={"memory": memory})
        self._foresee(number, prompt, decodes, lasting(memory), sampling(memory))

    def _foresee(self, number: int, prompt: Prompt, decodes: bool, lasting: Mapping[str, int], sampling: Held) -> None:
        if self.config.mesh.shard > 1 and self.free is not None and sampling.peak * (1 - ERROR) > self.free:
            raise preview_does_not_fit(number, f"sampling {prompt.bucket} on stage {self.stage}", sampling, self.free, FREE)
        vae, decoding = self._decoding(prompt.bucket, lasting) if decodes else (None, None)
        faults = [
            preview_does_not_fit(number, f"{doing} {prompt.bucket} on stage {self.stage}", held, *self.limit)
            for doing, held in (("sampling", sampling), ("decoding", decoding))
            if held is not None and self.limit is not None and held.peak * (1 - ERROR) > self.limit[0]
        ]
        self.previews = Foresight(prompt.bucket, sampling, decoding, vae, tuple(faults))

    def _taken(self, prompt: Prompt) -> dict[str, int]:
        """What sampling a prompt takes beside weights, by name; the same however many units stream."""
        asked = first_asked(self.model, prompt.blank(self.model), self.config.preview)
        return {
            "workspace": self.rehearsal.prediction(asked.microbatches, self.config.memory).whole,
            "latents and embeddings": asked.bytes,
        }

    def _decoding(self, bucket: Bucket, lasting: Mapping[str, int]) -> tuple[Decoding, Held]:
        """In the largest tiles that fit beside what stays on the device; where none do, in the smallest."""
        found: tuple[Decoding, Held] | None = None
        for halved in count():
            vae = measure_decoding(self.model, *dims(bucket), halved)
            if vae is None:
                break
            found = vae, Held({**lasting, "VAE": vae.weights, "decoder's activations": vae.taken})
            if self.limit is None or found[1].peak <= self.limit[0]:
                break
        assert found is not None  # as they are, tiles can always be taken
        return found

    def lines(self) -> Iterator[str]:
        """What was chosen and why, and what previews will hold, for a person."""
        for key, reason in self.reasons.items():
            yield f"memory.{key}: {str(getattr(self.config.memory, key)).lower()} ({reason})"
        if self.previews is not None:
            yield self.previews.line()

    @property
    def halved(self) -> int:
        """How often the sides of the VAE's tiles are halved, so that it fits beside what stays on the device."""
        return self.previews.vae.halved if self.previews is not None and self.previews.vae is not None else 0

    def warnings(self) -> Iterator[str]:
        """What will be left out for want of memory."""
        for fault in self.previews.faults if self.previews is not None else ():
            yield f"a preview for which memory runs out is left out: {fault}"

    def _judge(self, bucket: tuple[int, int, int]) -> Callable[[MemoryConfig], Estimate]:
        return lambda memory: self.rehearsal.estimate(bucket, memory)


def open_forecast(config: Config, model: DiffusionModel, mesh: Mesh) -> Forecast | None:
    """The forecast of this rank's stage; None on a CPU where there is no limit to keep, and nothing left open."""
    device = mesh.device
    if device.type != "cuda" and not is_open(config.memory) and config.mesh.memory is None:
        return None
    available = int(psutil.virtual_memory().available)
    if device.type != "cuda":
        return Forecast(config, model, mesh.stage, find_card(None, device), available)  # of which the device's memory is a part
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = int(torch.cuda.mem_get_info(device)[0])
    return Forecast(config, model, mesh.stage, find_card(None, device), free, available // processes)


class Comparison:
    """What steps held beside what was predicted."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast, self.steps = forecast, Counter[Bucket]()

    def due(self, bucket: Bucket) -> bool:
        """Count a step of a bucket; whether its first ones are done now."""
        self.steps[bucket] += 1
        return self.steps[bucket] == SETTLED

    def line(self, bucket: Bucket, held: int) -> str:
        """What to tell of a bucket.

        Args:
            held: the most that the step just done held.
        """
        predicted = self.forecast.of(bucket).peak
        return f"stage {self.forecast.stage} held {amount(held)}, predicted were {amount(predicted)} ({predicted / held - 1:+.1%})"


def _sampling(lasting: Mapping[str, int], gathered: int, taken: Mapping[str, int]) -> Held:
    return Held({**lasting, "gathered weights": gathered, **taken, "workspace": lasting["workspace"] + taken["workspace"]})


def _dearest(prompts: Sequence[Prompt]) -> tuple[int, Prompt]:
    """Which of the prompts takes most, and its number."""
    sizes = [dims(prompt.bucket) for prompt in prompts]
    number = sizes.index(largest(sizes))
    return number, prompts[number]


def dims(bucket: Bucket) -> tuple[int, int, int]:
    """Frames, height and width."""
    return bucket.frames, bucket.height, bucket.width
