"""Decides which samples make each step: every sample once per epoch (times repeats), the same order on any number of ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from diffpipe.data.buckets import Bucket
from diffpipe.errors import DiffpipeError


class Example(NamedTuple):
    """One showing of a sample. ``epoch`` is the one it was due in, which a leftover keeps: it decides its noise."""

    epoch: int
    sample: int
    repeat: int


@dataclass(frozen=True)
class Step:
    """What one replica sees in one optimizer step.

    Attributes:
        epoch: the running epoch, counted from 0.
        bucket: shared by all examples of the step on every replica.
        examples: ``micro * accumulate`` of them, microbatch after microbatch.
        epoch_ends: whether no step of this epoch follows.
    """

    epoch: int
    bucket: Bucket
    examples: tuple[Example, ...]
    epoch_ends: bool


class StepSampler(Iterator[Step]):
    """An endless, seeded stream of steps.

    Each epoch has a new order. Within a bucket, ``replicas * accumulate * micro`` examples make a step; those left
    over open the next epoch, so that none is ever lost. The order is that of a hash of (seed, example), which no
    version of any library can change.

    Args:
        buckets: of each sample.
        repeats: of each sample: how often an epoch shows it; 0.5 shows it in every second epoch, half of such samples in each.
        micro, accumulate, replica, replicas: how a step is shared out; only their product decides the stream.

    Raises:
        DiffpipeError: when there is no sample.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        repeats: Sequence[float],
        *,
        micro: int,
        accumulate: int,
        seed: int,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        if not buckets:
            raise DiffpipeError("there is no sample to train on", where="data.folders", fix="see which files were dropped, and why")
        self._buckets, self._repeats, self._seed = tuple(buckets), tuple(repeats), seed
        self._share = micro * accumulate
        self._replica, self._group = replica, micro * accumulate * replicas
        self._epoch, self._done, self._fresh = 0, 0, True
        self._carried: list[Example] = []
        shapes = "\n".join(f"{b} {r}" for b, r in zip(buckets, repeats, strict=True))
        self._fingerprint = blake2b(shapes.encode(), digest_size=16).hexdigest()
        self._plan()

    @property
    def steps_in_epoch(self) -> int:
        """Steps of the running epoch; it varies by a few from epoch to epoch as leftovers add up to batches."""
        return len(self._steps)

    @property
    def epochs_over(self) -> int:
        """Epochs of which no step follows."""
        return self._epoch + (0 < self._done == len(self._steps))

    @property
    def left(self) -> list[Example]:
        """Examples of the running epoch that fill no batch in it and open the next one."""
        return list(self._left)

    def steps_until(self, epochs: int) -> int:
        """Steps from this place to the end of the first ``epochs`` epochs."""
        if epochs <= self._epoch:
            return 0
        unseen = [example for step in self._steps[self._done :] for example in step] + self._left
        counts = Counter(self._buckets[example.sample] for example in unseen)
        for sample, bucket in enumerate(self._buckets):
            counts[bucket] += self._until(sample, epochs) - self._until(sample, self._epoch + 1)
        return sum(n // self._group for n in counts.values())

    def __next__(self) -> Step:
        while self._done == len(self._steps):
            # A bucket gains examples with every epoch, so some epoch has a step.
            self._epoch, self._done, self._fresh, self._carried = self._epoch + 1, 0, True, self._left
            self._plan()
        examples = self._steps[self._done]
        self._done += 1
        own = examples[self._replica * self._share : (self._replica + 1) * self._share]
        return Step(self._epoch, self._buckets[own[0].sample], tuple(own), self._done == len(self._steps))

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream as JSON, the same on every replica."""
        return {
            "epoch": self._epoch,
            "done": self._done,
            "fresh": self._fresh,
            "carried": [list(e) for e in self._carried],
            "group": self._group,
            "seed": self._seed,
            "samples": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a place, exactly; with another batch size, from the same examples still unseen.

        Returns:
            What a person should know when the place could not be kept: the samples changed, so a new epoch begins.
        """
        self._epoch, self._done, self._fresh = state["epoch"], state["done"], state["fresh"]
        self._carried = [Example(*e) for e in state["carried"]]
        if state["samples"] != self._fingerprint:
            begun = bool(self._done or self._carried)
            self._epoch, self._done, self._fresh, self._carried = self._epoch + begun, 0, True, []
            self._plan()
            return f"the samples are not those of the checkpoint, so epoch {self._epoch + 1} starts from its beginning"
        group, seed = self._group, self._seed
        self._group, self._seed = state["group"], state["seed"]
        self._plan()
        if (group, seed) != (self._group, self._seed):
            unseen = [e for step in self._steps[self._done :] for e in step] + self._left
            self._done, self._fresh, self._carried = 0, False, unseen
            self._group, self._seed = group, seed
            self._plan()
        return None

    def _plan(self) -> None:
        """Lay out the running epoch from what was carried into it and, unless that holds it already, its own examples."""
        pools: dict[Bucket, list[Example]] = defaultdict(list)
        for example in self._carried:
            pools[self._buckets[example.sample]].append(example)
        if self._fresh:
            own = [Example(self._epoch, s, r) for s in range(len(self._repeats)) for r in range(self._shown(s, self._epoch))]
            for example in sorted(own, key=lambda e: self._rank(*e)):
                pools[self._buckets[example.sample]].append(example)
        steps: list[list[Example]] = []
        self._left: list[Example] = []
        for bucket in sorted(pools):
            pool = pools[bucket]
            full = len(pool) // self._group * self._group
            steps += [pool[i : i + self._group] for i in range(0, full, self._group)]
            self._left += pool[full:]
        self._steps = sorted(steps, key=lambda step: self._rank(self._epoch, *step[0]))

    def _rank(self, *what: int | str) -> bytes:
        return blake2b(repr((self._seed, *what)).encode(), digest_size=16).digest()

    def _shown(self, sample: int, epoch: int) -> int:
        """How often an epoch shows a sample."""
        return self._until(sample, epoch + 1) - self._until(sample, epoch)

    def _until(self, sample: int, epochs: int) -> int:
        """How often the first ``epochs`` epochs show a sample; where that is no whole number, samples take turns."""
        repeats = self._repeats[sample]
        if repeats == int(repeats):
            return int(repeats) * epochs
        turn = int.from_bytes(self._rank("turn", sample)[:6], "big") / (1 << 48)
        return int(repeats * epochs + turn)
