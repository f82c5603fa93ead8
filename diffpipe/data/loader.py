"""Turns steps into batches of model inputs in worker processes, and knows the place from which to go on exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from diffpipe.data.buckets import Bucket
from diffpipe.data.dataset import Samples, stack
from diffpipe.data.sampler import Step, StepSampler
from diffpipe.data.workers import outlive_signals, told_of_death, worker_context
from diffpipe.flow import Key
from diffpipe.models.base import DiffusionModel, Targets

Microbatch = tuple[dict[str, Any], Targets]


@dataclass(frozen=True)
class Batch:
    """What one pipeline works on in one step, on the CPU.

    Attributes:
        microbatches: (inputs of the denoiser's forward, targets), all of one bucket.
        epoch: counted from 0.
        samples: indices into the samples, microbatch after microbatch.
        times: the t in [0, 1] of each of them; 1 is pure noise.
        epoch_ends: whether this is the last step of its epoch.
        quantile: of the timestep distribution, in evaluation.
    """

    microbatches: list[Microbatch]
    bucket: Bucket
    epoch: int
    samples: list[int]
    times: list[float]
    epoch_ends: bool
    quantile: float | None = None

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by torch's loader."""
        return replace(self, microbatches=tree_map(lambda x: x.pin_memory() if isinstance(x, Tensor) else x, self.microbatches))


class Steps(Dataset[Batch]):
    """Makes a batch of a step; this is what runs in the workers."""

    def __init__(self, samples: Samples, model: DiffusionModel, *, micro: int, seed: int, normalize_masks: bool = False) -> None:
        self._samples, self._model, self._micro, self._seed, self._normalize = samples, model, micro, seed, normalize_masks

    def __getitem__(self, step: Step) -> Batch:
        keys = [Key(self._seed, e.epoch, e.sample, e.repeat) for e in step.examples]
        chosen = [e.sample for e in step.examples]
        microbatches, times = _prepare(self._samples, self._model, chosen, keys, self._micro, self._normalize)
        return Batch(microbatches, step.bucket, step.epoch, chosen, times, step.epoch_ends)


class Loader:
    """An endless iterator of batches, prefetched by workers.

    It begins at the sampler's place, and draws ahead from it. The state is the sampler's place after the last batch handed out. It is
    JSON, the same on every rank, and free of the number of workers, stages or replicas, so that a checkpoint loads on another mesh.
    """

    def __init__(self, steps: Steps, sampler: StepSampler, workers: int, pinned: bool = False) -> None:
        self._batches: Iterator[Batch] | None = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata calls what torch has deprecated
            self._loader: Any = StatefulDataLoader(
                steps,
                batch_size=None,
                sampler=_Once(sampler),
                num_workers=workers,
                collate_fn=_as_is,  # pyright: ignore[reportArgumentType] - torchdata's alias names no type
                # Its own generator: the loader must not draw from the global one, whose state belongs to the training.
                generator=torch.Generator().manual_seed(0),
                multiprocessing_context=worker_context() if workers else None,
                worker_init_fn=outlive_signals,
                pin_memory=pinned,
            )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with told_of_death("data.workers"):
            if self._batches is None:
                self._batches = iter(self._loader)
            return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        place = _place(self._loader.state_dict())
        assert place is not None, "torchdata keeps the state of the sampler it draws from"
        return place

    def close(self) -> None:
        """End the workers."""
        self._batches = None
        self._loader = None


def make_loader(
    samples: Samples,
    sampler: StepSampler,
    model: DiffusionModel,
    *,
    micro: int,
    seed: int,
    workers: int,
    normalize_masks: bool = False,
    pinned: bool = False,
) -> Loader:
    """Batches of ``samples`` in the order of ``sampler``, made ready by ``model`` in ``workers`` processes (0: in this one).

    Args:
        pinned: put tensors into page-locked memory, from which a CUDA device copies while it computes.
    """
    return Loader(Steps(samples, model, micro=micro, seed=seed, normalize_masks=normalize_masks), sampler, workers, pinned)


def eval_batches(
    samples: Samples,
    model: DiffusionModel,
    *,
    quantiles: Sequence[float],
    micro: int,
    seed: int,
    accumulate: int = 1,
    replica: int = 0,
    replicas: int = 1,
    in_step: bool = False,
    normalize_masks: bool = False,
) -> Iterator[Batch]:
    """Every sample once at every quantile, in a fixed order, with the same noise at every evaluation and quantile.

    A batch is up to ``accumulate`` microbatches of up to ``micro`` samples of one bucket: none is lost, the last of
    a bucket may be smaller. Replicas take turns with batches.

    Args:
        in_step: every replica has as many batches as the others, the last of which may be one of another's, without samples to count.
    """
    by_bucket: dict[Bucket, list[int]] = {}
    for i, bucket in enumerate(samples.buckets):
        by_bucket.setdefault(bucket, []).append(i)
    groups = [
        (bucket, members[i : i + micro * accumulate])
        for bucket, members in sorted(by_bucket.items())
        for i in range(0, len(members), micro * accumulate)
    ]
    own = groups[replica::replicas]
    lacking = in_step and len(own) < len(groups[::replicas])  # than the first has
    for quantile in quantiles:
        for i, (bucket, members) in enumerate(own + groups[:1] * lacking):
            keys = [Key(seed, 0, s, 0, quantile) for s in members]
            microbatches, times = _prepare(samples, model, members, keys, micro, normalize_masks)
            counted = members if i < len(own) else []
            yield Batch(microbatches, bucket, 0, counted, times[: len(counted)], False, quantile)


def _prepare(
    samples: Samples, model: DiffusionModel, chosen: Sequence[int], keys: Sequence[Key], micro: int, normalize: bool
) -> tuple[list[Microbatch], list[float]]:
    """A step's microbatches and each sample's t; what the family pads, it pads to the step's longest, for its payloads have one shape."""
    rows = model.align([samples.read(i, key) for i, key in zip(chosen, keys, strict=True)])
    times = model.times(rows[0]["latents"][None], keys).tolist()
    return [_prepare_one(model, stack(rows[i : i + micro]), keys[i : i + micro], normalize) for i in range(0, len(rows), micro)], times


def _prepare_one(model: DiffusionModel, batch: dict[str, Tensor], keys: Sequence[Key], normalize: bool) -> Microbatch:
    """A microbatch with its masks in the weights of the loss.

    A mask multiplies the error of each element before the mean over all, so that a picture counts by the share of it that
    trains; ``normalize`` divides by that share.
    """
    mask = batch.pop("mask", None)
    inputs, targets = model.prepare(batch, keys)
    if mask is None:
        return inputs, targets
    if normalize:
        mask = mask / mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    weighted = []
    for target, weight in targets:
        own = model.spread(mask, target)
        weighted.append((target, own if weight is None else own * weight))
    return inputs, weighted


class _Once:
    """Gives the loader the sampler's own stream, rather than a new one at each iteration."""

    def __init__(self, sampler: StepSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> StepSampler:
        return self._sampler


def _as_is(batch: Batch) -> Batch:
    return batch


def _place(state: Any) -> dict[str, Any] | None:
    """The sampler's state inside torchdata's, which nests it differently with and without workers."""
    if isinstance(state, dict):
        if state.keys() >= {"carried", "group", "done"}:
            return state
        return next((place for inner in state.values() if (place := _place(inner)) is not None), None)
    return None
