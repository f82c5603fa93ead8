"""Encodes entries that the cache lacks: shared out among ranks, decoded by workers, written as they are made."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffpipe.config.schema import Config
from diffpipe.data.cache import ShardWriter, key_of, writing_to
from diffpipe.data.dataset import Sample
from diffpipe.data.media import read, read_mask
from diffpipe.data.workers import told_of_death, worker_context
from diffpipe.durable import UNFINISHED
from diffpipe.errors import DiffpipeError, MediaError
from diffpipe.metrics import Progress
from diffpipe.models.base import DiffusionModel, Geometry
from diffpipe.pipeline.memory.shortage import explained

CLAIM = 8  # entries that a rank takes from the common work at a time
TOLD = {"media": "media", "mask": "masks", "text": "captions", "negative": "negative prompts"}  # what a person is told of each kind

ShowProgress = Callable[[Progress], None]


def cache_folder(config: Config) -> Path:
    return config.data.cache_dir or config.output_dir / "cache"


def text_key(text: str, model: DiffusionModel) -> str:
    """Where a caption's tensors lie."""
    return key_of("text", text, model.identity("text"))


@dataclass(frozen=True)
class Task:
    """One entry to make.

    Attributes:
        kind: "media", "mask", "text" or "negative", a text that samples are guided away from.
        sample: the first that needs it; for its control, as if that were its picture.
        text: the caption, or the prompt of a preview.
    """

    key: str
    kind: str
    sample: Sample | None = None
    text: str = ""


def tasks_of(entries: Sequence[Sample], model: DiffusionModel) -> dict[str, Task]:
    """Every entry that the samples need, by key: media in the order of buckets, so that equal shapes are encoded together."""
    tasks: dict[str, Task] = {}
    for entry in sorted(entries, key=lambda e: e.bucket):
        tasks.setdefault(entry.media, Task(entry.media, "media", entry))
        if entry.control is not None:
            assert entry.control_file is not None
            shown = replace(entry, file=entry.control_file, start=None)
            tasks.setdefault(entry.control, Task(entry.control, "media", shown))
    for entry in entries:
        if entry.mask is not None:
            tasks.setdefault(entry.mask, Task(entry.mask, "mask", entry))
        for key, text in zip(entry.texts, entry.captions, strict=True):
            tasks.setdefault(key, Task(key, "text", None, text))
    if any(e.dropout for e in entries):
        empty = text_key("", model)
        tasks.setdefault(empty, Task(empty, "text"))
    return tasks


class Claims:
    """Shares a list of work out among ranks as they get to it: who makes a file of a number first does that part.

    Files rather than messages, since ranks are busy encoding, and since the cache is a folder that all of them see.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / f"{UNFINISHED}claims-{name}"

    def take(self, kind: str, total: int, size: int = CLAIM) -> Iterator[range]:
        """Parts of ``range(total)`` that no other rank has taken."""
        with writing_to(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        for begin in range(0, total, size):
            try:
                with writing_to(self._folder):
                    os.close(os.open(self._folder / f"{kind}-{begin}", os.O_CREAT | os.O_EXCL))
            except DiffpipeError as fault:
                if isinstance(fault.__cause__, FileExistsError):
                    continue
                raise
            yield range(begin, min(begin + size, total))

    def add_done(self, kind: str, rank: int, count: int) -> None:
        """Let the others see that this rank has done more of a kind of work: its file grows by a byte for each entry."""
        with writing_to(self._folder), open(self._folder / f"{kind} done by {rank}", "ab") as file:
            file.write(b"." * count)

    def done(self, kind: str, world: int) -> tuple[int, ...]:
        """How much of a kind of work each rank has done."""
        files = [self._folder / f"{kind} done by {rank}" for rank in range(world)]
        return tuple(file.stat().st_size if file.exists() else 0 for file in files)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class _Decoder(Dataset[Any]):
    """Reads media in worker processes; gives what is wrong with a file instead of raising it."""

    def __init__(self, tasks: Sequence[Task], geometry: Geometry) -> None:
        self._tasks, self._geometry = tasks, geometry

    def __getitem__(self, index: int) -> tuple[int, Tensor | MediaError]:
        task = self._tasks[index]
        entry = task.sample
        assert entry is not None
        try:
            if task.kind == "mask":
                assert entry.mask_file is not None
                return index, read_mask(entry.mask_file, entry.bucket, self._geometry.spatial, (entry.source[1], entry.source[0]))
            fps = None if entry.start is None else self._geometry.fps
            pixels = read(entry.file, entry.bucket, fps, entry.start or 0.0)
            if missing := entry.bucket.frames - pixels.shape[1]:
                # A picture for a bucket of several frames begins a clip that is to be made: the others are grey.
                pixels = nn.functional.pad(pixels, (0, 0, 0, 0, 0, missing))
            return index, pixels
        except MediaError as fault:
            return index, fault
        except OSError as fault:
            return index, MediaError(f"cannot be read: {fault.strerror or fault}", where=str(entry.file))


@dataclass(frozen=True)
class Share:
    """What a rank has done of the missing entries.

    Attributes:
        faults: what could not be decoded, by key.
        done: how many entries of each kind, those that could not be decoded too.
    """

    faults: dict[str, MediaError]
    done: Counter[str]


class Encoder:
    """Encodes what this rank takes of the missing entries."""

    def __init__(
        self, config: Config, model: DiffusionModel, device: torch.device, claims: Claims, rank: int, world: int, progress: ShowProgress
    ) -> None:
        self._config, self._model, self._device, self._claims = config, model, device, claims
        self._rank, self._world, self._progress = rank, world, progress
        self._totals: dict[str, int] = {}
        self._done = Counter[str]()

    def run(self, tasks: Sequence[Task]) -> Share:
        """Do it. The encoders are in memory only meanwhile."""
        by_kind = {kind: [t for t in tasks if t.kind == kind] for kind in TOLD}
        self._totals = {TOLD[kind]: len(each) for kind, each in by_kind.items() if each}
        if not tasks:
            return Share({}, self._done)
        encoders: Any = self._model.load_encoders(self._device) if len(by_kind["mask"]) < len(tasks) else None
        faults: dict[str, MediaError] = {}
        try:
            fixes = ("data.encode_batch: 1", "smaller data.resolutions or data.frames", "a card with more memory")
            with (
                explained("the encoding", self._device, fixes),
                torch.inference_mode(),
                ShardWriter(cache_folder(self._config)) as writer,
            ):
                self._media(by_kind["media"], encoders, writer, faults)
                self._masks(by_kind["mask"], writer, faults)
                self._texts(by_kind["text"], TOLD["text"], partial(self._model.encode_text, encoders), writer)
                self._texts(by_kind["negative"], TOLD["negative"], partial(self._model.encode_negative, encoders), writer)
        finally:
            del encoders
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return Share(faults, self._done)

    def end(self, shares: Sequence[Share]) -> None:
        """Tell that all is done. Only when every rank is through is this known on all of them.

        Args:
            shares: of all ranks, in their order.
        """
        for kind, total in self._totals.items():
            self._progress(Progress(f"encode {kind}", total, total, tuple(share.done[kind] for share in shares)))

    def _show(self, kind: str, count: int) -> None:
        """Tell of ``count`` more entries, if they are not the last."""
        self._done[kind] += count
        self._claims.add_done(kind, self._rank, count)
        by_rank = self._claims.done(kind, self._world)
        if sum(by_rank) < self._totals[kind]:
            self._progress(Progress(f"encode {kind}", sum(by_rank), self._totals[kind], by_rank))

    def _media(self, tasks: Sequence[Task], encoders: Any, writer: ShardWriter, faults: dict[str, MediaError]) -> None:
        for group in _alike(self._decoded(tasks, "media", faults), self._config.data.encode_batch):
            made = self._model.encode_media(encoders, torch.stack([pixels for _, pixels in group]))
            for i, (task, _) in enumerate(group):
                writer.add(task.key, {name: tensor[i] for name, tensor in made.items()})
            self._show("media", len(group))

    def _masks(self, tasks: Sequence[Task], writer: ShardWriter, faults: dict[str, MediaError]) -> None:
        for task, mask in self._decoded(tasks, "masks", faults):
            writer.add(task.key, {"mask": mask})
            self._show("masks", 1)

    def _texts(self, tasks: Sequence[Task], kind: str, encode: Callable[[list[str]], Any], writer: ShardWriter) -> None:
        if not tasks:
            return
        step = self._config.data.encode_batch
        for part in self._claims.take(kind, len(tasks)):
            for first in range(part.start, part.stop, step):
                group = tasks[first : min(first + step, part.stop)]
                made = encode([t.text for t in group])
                for i, task in enumerate(group):
                    writer.add(task.key, {name: tensor[i] for name, tensor in made.items()})
                self._show(kind, len(group))

    def _decoded(self, tasks: Sequence[Task], kind: str, faults: dict[str, MediaError]) -> Iterator[tuple[Task, Tensor]]:
        """What this rank takes of the tasks, decoded by worker processes a little ahead of the encoder."""
        if not tasks:
            return
        workers = min(self._config.data.encode_workers, len(tasks))
        order = (i for part in self._claims.take(kind, len(tasks)) for i in part)
        loader = DataLoader(
            _Decoder(tasks, self._model.geometry),
            sampler=order,  # pyright: ignore[reportArgumentType] - any iterable serves
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=worker_context() if workers else None,
            generator=torch.Generator().manual_seed(0),  # the global one belongs to the training
        )
        decoded = iter(loader)
        while True:
            with told_of_death("data.encode_workers"):
                found = next(decoded, None)
            if found is None:
                return
            index, pixels = found
            task = tasks[index]
            if isinstance(pixels, MediaError):
                faults[task.key] = pixels
                self._show(kind, 1)
            else:
                yield task, pixels


def _alike(decoded: Iterator[tuple[Task, Tensor]], size: int) -> Iterator[list[tuple[Task, Tensor]]]:
    """Consecutive entries that can be encoded at once: same shape, at most ``size``."""
    for _, run in groupby(decoded, key=lambda pair: (pair[1].shape, pair[0].sample and pair[0].sample.bucket)):
        group: list[tuple[Task, Tensor]] = []
        for pair in run:
            group.append(pair)
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group
