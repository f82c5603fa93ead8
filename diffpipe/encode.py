"""Act one: folders of media and captions become a cache of tensors; what is cached already is not touched."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffpipe.config.schema import Config, FolderBase
from diffpipe.data.buckets import Bucket, make_buckets
from diffpipe.data.cache import UNFINISHED, Cache, ShardWriter, key_of, writing_to
from diffpipe.data.captions import variants
from diffpipe.data.dataset import Sample, Samples
from diffpipe.data.files import File
from diffpipe.data.media import PIXELS, read, read_mask
from diffpipe.data.scan import NOT_MEDIA, Clip, Dropped, Exchange, Found, Remembered, scan
from diffpipe.data.workers import told_of_death, worker_context
from diffpipe.errors import DiffpipeError, MediaError
from diffpipe.metrics import Progress
from diffpipe.models.base import DiffusionModel, Geometry

CLAIM = 8  # entries that a rank takes from the common work at a time


ShowProgress = Callable[[Progress], None]


@dataclass
class Report:
    """What became of the files, over all ranks.

    Attributes:
        files: media files that became samples.
        samples: one for each file (or clip of it) and resolution.
        encoded, reused: entries of media, masks and captions made now, and found in the cache.
        dropped: files left out, each with its reason.
        captionless: files that train without a caption.
        damaged: cache shards that could not be read; what they held was made again.
    """

    files: int = 0
    samples: int = 0
    encoded: int = 0
    reused: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    captionless: list[File] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    buckets: dict[Bucket, int] = field(default_factory=dict)

    @property
    def faults(self) -> list[Dropped]:
        return [d for d in self.dropped if d.fault]

    def lines(self) -> list[str]:
        """The report for a person."""
        text = [
            f"files {self.files}, samples {self.samples}, buckets {len(self.buckets)}; "
            f"{self.encoded} entries encoded, {self.reused} found in the cache"
        ]
        text += [f"  bucket {bucket}: samples {count}" for bucket, count in sorted(self.buckets.items())]
        text += [f"left out: {d.file}: {d.reason}" for d in self.faults]
        others = Counter(
            f"{d.reason} ({d.file.suffix or 'no suffix'})" if d.reason == NOT_MEDIA else d.reason for d in self.dropped if not d.fault
        )
        text += [f"not used: {count} x {reason}" for reason, count in sorted(others.items())]
        if self.captionless:
            some = ", ".join(f.name for f in self.captionless[:3])
            text.append(f"warning: {len(self.captionless)} files have no caption and train with an empty one, such as {some}")
        text += [f"damaged cache shard, not used: {path}" for path in self.damaged]
        return text


def prepare_data(
    config: Config,
    model: DiffusionModel,
    folders: Sequence[FolderBase],
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange = lambda value: [value],
    progress: ShowProgress = lambda p: None,
    again: bool = False,
) -> tuple[Samples, Report]:
    """The samples of ``folders``, encoded where the cache does not hold them yet.

    All ranks call it together and get the same samples; each scans a share, and encodes as much as it gets to. Faults
    of files are collected, and what could be encoded stays cached whatever the outcome.

    Args:
        exchange: gathers every rank's value, in the order of ranks.
        again: encode what the cache holds too.

    Raises:
        DiffpipeError: on every rank alike: with ``on_error: fail``, one that lists all faults; when no sample is
            left; when the cache cannot be written.
    """
    folder = cache_folder(config)
    memory = Remembered(folder / "files.json")
    found = look(config, model, folders, memory, rank, world, exchange, progress)
    entries, misplaced = place(found.clips, config, model, folders)
    cache = Cache(folder)
    tasks = _tasks(entries, model)
    wanted = list(tasks)
    missing = set(wanted) if again else cache.missing(wanted)
    claims = _Claims(folder, exchange(os.urandom(8).hex())[0])
    encoder = _Encoder(config, model, device, claims, rank, world, progress)
    faults = _agree(exchange, lambda: encoder.run([t for k, t in tasks.items() if k in missing]))
    _agree(exchange, lambda: memory.save(found.clips) if rank == 0 else None)
    cache.refresh()
    _agree(exchange, lambda: _settle(cache, claims) if rank == 0 else None)
    bad = {d.file for d in faults}
    kept = [e for e in entries if e.file not in bad]
    held = set(_tasks(kept, model))
    report = Report(
        files=len({e.file for e in kept}),
        samples=len(kept),
        encoded=len(missing & held),
        reused=len(held - missing),
        dropped=found.dropped + misplaced + sorted(faults, key=lambda d: d.file),
        captionless=found.captionless,
        damaged=cache.damaged,
        buckets=dict(Counter(e.bucket for e in kept)),
    )
    _judge(report, kept, config, held, cache)
    return make_samples(kept, cache, model), report


def look(
    config: Config,
    model: DiffusionModel,
    folders: Sequence[FolderBase],
    memory: Remembered,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange = lambda value: [value],
    progress: ShowProgress = lambda p: None,
) -> Found:
    """What the folders hold."""
    return scan(
        folders,
        config.data.of,
        takes_video=model.geometry.fps is not None,
        memory=memory,
        rank=rank,
        world=world,
        exchange=exchange,
        progress=lambda done, total: progress(Progress("scan", done, total)),
    )


def make_samples(entries: list[Sample], cache: Cache, model: DiffusionModel) -> Samples:
    """The samples over a cache that holds them."""
    empty = _text_key("", model) if any(e.dropout for e in entries) else None
    return Samples(entries, cache, empty, model.geometry.spatial)


def cache_folder(config: Config) -> Path:
    return config.data.cache_dir or config.output_dir / "cache"


def _settle(cache: Cache, claims: _Claims) -> None:
    cache.write_index()
    claims.close()


def place(
    clips: Sequence[Clip], config: Config, model: DiffusionModel, folders: Sequence[FolderBase]
) -> tuple[list[Sample], list[Dropped]]:
    """One sample for each clip, part of it and resolution, with the keys of its entries."""
    options = [config.data.of(f) for f in folders]
    buckets = [make_buckets(o, model.geometry) for o in options]
    seen_by, rate = model.identity("media"), model.geometry.fps
    keys: dict[str, str] = {}
    entries, dropped = [], []
    for clip in clips:
        said = options[clip.folder].captions
        try:
            for span in clip.spans:
                shown = tuple(v for text in span.texts or ("",) for v in variants(text, said))
                for text in shown:
                    keys.setdefault(text, _text_key(text, model))
                for placed in buckets[clip.folder].place(clip.info, span.start, span.end):
                    bucket, start = placed.bucket, placed.start
                    when = "" if start is None else f" from {start:.6f} s at {rate:g} fps"
                    mask = None
                    if clip.mask is not None:
                        mask = key_of(
                            "mask", clip.mask[1], f"{bucket.height}x{bucket.width} cells {model.geometry.spatial} pixels {PIXELS}"
                        )
                    entries.append(
                        Sample(
                            file=clip.file,
                            captions=shown,
                            bucket=bucket,
                            repeats=folders[clip.folder].repeats,
                            media=key_of("media", clip.digest, f"{bucket} centre{when} pixels {PIXELS}", seen_by),
                            texts=tuple(keys[text] for text in shown),
                            mask=mask,
                            mask_file=clip.mask[0] if clip.mask is not None else None,
                            source=(clip.info.height, clip.info.width),
                            start=start,
                            dropout=said.dropout,
                        )
                    )
        except MediaError as fault:
            dropped.append(Dropped.of(clip.file, fault))
    bad = {d.file for d in dropped}
    return [e for e in entries if e.file not in bad], dropped


def _text_key(text: str, model: DiffusionModel) -> str:
    return key_of("text", text, model.identity("text"))


def _judge(report: Report, kept: list[Sample], config: Config, held: set[str], cache: Cache) -> None:
    """Raise when the data cannot be trained on as the config wants it."""
    faults = report.faults
    if faults and config.data.on_error == "fail":
        listed = "\n".join(f"  {d.file}: {d.reason}" for d in faults)
        count = "1 file is" if len(faults) == 1 else f"{len(faults)} files are"
        raise MediaError(
            f"{count} not usable\n{listed}",
            where="data.folders",
            fix="mend or remove them, or set data.on_error to skip; the others are cached",
        )
    if not kept:
        reasons = Counter(d.reason for d in report.dropped)
        told = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
        raise DiffpipeError(f"no sample is left: {told}", where="data.folders", fix="see the list of reasons")
    lost = cache.missing(held)
    if lost:
        raise DiffpipeError(
            f"{len(lost)} of {len(held)} entries are missing after encoding",
            where=str(cache.folder),
            expected="one cache folder that all processes see",
            fix="set data.cache_dir to a folder shared by all machines",
        )


def _agree(exchange: Exchange, work: Callable[[], list[Dropped] | None]) -> list[Dropped]:
    """Do this rank's share; afterwards all ranks go on with everyone's faults, or all raise what one of them met."""
    mine: tuple[list[Dropped], DiffpipeError | None]
    try:
        mine = (work() or [], None)
    except DiffpipeError as fault:
        mine = ([], fault)
    shares = exchange(mine)
    for _, fault in shares:
        if fault is not None:
            raise fault
    return [d for share, _ in shares for d in share]


# -- the work --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One entry to make.

    Attributes:
        kind: "media", "mask" or "text".
        sample: the first that needs it.
        text: the caption.
    """

    key: str
    kind: str
    sample: Sample | None = None
    text: str = ""


def _tasks(entries: Sequence[Sample], model: DiffusionModel) -> dict[str, _Task]:
    """Every entry that the samples need, by key: media in the order of buckets, so that equal shapes are encoded together."""
    tasks: dict[str, _Task] = {}
    for entry in sorted(entries, key=lambda e: e.bucket):
        tasks.setdefault(entry.media, _Task(entry.media, "media", entry))
    for entry in entries:
        if entry.mask is not None:
            tasks.setdefault(entry.mask, _Task(entry.mask, "mask", entry))
        for key, text in zip(entry.texts, entry.captions, strict=True):
            tasks.setdefault(key, _Task(key, "text", None, text))
    if any(e.dropout for e in entries):
        empty = _text_key("", model)
        tasks.setdefault(empty, _Task(empty, "text"))
    return tasks


class _Claims:
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

    def __init__(self, tasks: Sequence[_Task], geometry: Geometry) -> None:
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
            return index, read(entry.file, entry.bucket, fps, entry.start or 0.0)
        except MediaError as fault:
            return index, fault
        except OSError as fault:
            return index, MediaError(f"cannot be read: {fault.strerror or fault}", where=str(entry.file))


class _Encoder:
    """Encodes what this rank takes of the missing entries."""

    def __init__(
        self, config: Config, model: DiffusionModel, device: torch.device, claims: _Claims, rank: int, world: int, progress: ShowProgress
    ) -> None:
        self._config, self._model, self._device, self._claims = config, model, device, claims
        self._rank, self._world, self._progress = rank, world, progress

    def run(self, tasks: Sequence[_Task]) -> list[Dropped]:
        """Do it; gives the files that could not be decoded. The encoders are in memory only meanwhile."""
        by_kind = {kind: [t for t in tasks if t.kind == kind] for kind in ("media", "mask", "text")}
        if not tasks:
            return []
        encoders = self._model.load_encoders(self._device) if by_kind["media"] or by_kind["text"] else None
        faults: dict[File, Dropped] = {}
        try:
            with torch.inference_mode(), ShardWriter(cache_folder(self._config)) as writer:
                self._media(by_kind["media"], encoders, writer, faults)
                self._masks(by_kind["mask"], writer, faults)
                self._texts(by_kind["text"], encoders, writer)
        finally:
            del encoders
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return list(faults.values())

    def _show(self, kind: str, count: int, total: int) -> None:
        """Tell of ``count`` more entries."""
        self._claims.add_done(kind, self._rank, count)
        by_rank = self._claims.done(kind, self._world)
        self._progress(Progress(f"encode {kind}", sum(by_rank), total, by_rank))

    def _media(self, tasks: Sequence[_Task], encoders: Any, writer: ShardWriter, faults: dict[File, Dropped]) -> None:
        for group in _alike(self._decoded(tasks, "media", faults), self._config.data.encode_batch):
            made = self._model.encode_media(encoders, torch.stack([pixels for _, pixels in group]))
            for i, (task, _) in enumerate(group):
                writer.add(task.key, {name: tensor[i] for name, tensor in made.items()})
            self._show("media", len(group), len(tasks))

    def _masks(self, tasks: Sequence[_Task], writer: ShardWriter, faults: dict[File, Dropped]) -> None:
        for task, mask in self._decoded(tasks, "masks", faults):
            writer.add(task.key, {"mask": mask})
            self._show("masks", 1, len(tasks))

    def _texts(self, tasks: Sequence[_Task], encoders: Any, writer: ShardWriter) -> None:
        step = self._config.data.encode_batch
        for part in self._claims.take("captions", len(tasks)):
            for first in range(part.start, part.stop, step):
                group = tasks[first : min(first + step, part.stop)]
                made = self._model.encode_text(encoders, [t.text for t in group])
                for i, task in enumerate(group):
                    writer.add(task.key, {name: tensor[i] for name, tensor in made.items()})
                self._show("captions", len(group), len(tasks))

    def _decoded(self, tasks: Sequence[_Task], kind: str, faults: dict[File, Dropped]) -> Iterator[tuple[_Task, Tensor]]:
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
                assert task.sample is not None
                faults[task.sample.file] = Dropped.of(task.sample.file, pixels)
                self._show(kind, 1, len(tasks))
            else:
                yield task, pixels


def _alike(decoded: Iterator[tuple[_Task, Tensor]], size: int) -> Iterator[list[tuple[_Task, Tensor]]]:
    """Consecutive entries that can be encoded at once: same shape, at most ``size``."""
    for _, run in groupby(decoded, key=lambda pair: (pair[1].shape, pair[0].sample and pair[0].sample.bucket)):
        group: list[tuple[_Task, Tensor]] = []
        for pair in run:
            group.append(pair)
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group
