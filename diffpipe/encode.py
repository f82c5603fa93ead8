"""Act one: folders of media and captions become a cache of tensors; what is cached already is not touched."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from diffpipe.config.schema import Config, FolderBase
from diffpipe.data.buckets import Bucket, make_buckets
from diffpipe.data.cache import Cache, key_of
from diffpipe.data.captions import variants
from diffpipe.data.dataset import Sample, Samples
from diffpipe.data.files import File
from diffpipe.data.media import MASKS, PIXELS
from diffpipe.data.scan import NOT_MEDIA, Clip, Dropped, Exchange, Found, Remembered, scan
from diffpipe.encoder import Claims, Encoder, ShowProgress, Task, cache_folder, tasks_of, text_key
from diffpipe.errors import ConfigError, DiffpipeError, MediaError
from diffpipe.metrics import Progress
from diffpipe.models.base import DiffusionModel
from diffpipe.prompts import Prompt, Prompts, entries_of

T = TypeVar("T")


@dataclass
class Report:
    """What became of the files, over all ranks.

    Attributes:
        files: media files that became samples.
        samples: one for each file (or clip of it) and resolution.
        encoded, reused: entries of media, masks and captions made now, and found in the cache.
        dropped: files left out, each with its reason.
        captionless: files that train without a caption.
        maskless: files that train as a whole although their folder has masks.
        frames: counts of data.frames that the model does not take, with those it takes instead.
        damaged: cache shards that could not be read; what they held was made again.
    """

    files: int = 0
    samples: int = 0
    encoded: int = 0
    reused: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    captionless: list[File] = field(default_factory=list)
    maskless: list[File] = field(default_factory=list)
    frames: dict[int, int] = field(default_factory=dict)
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
        text += [
            f"data.frames: {wanted} is {taken} here, the next count below it that the model takes" for wanted, taken in self.frames.items()
        ]
        text += [f"left out: {d.file}: {d.reason}" for d in self.faults]
        others = Counter(
            f"{d.reason} ({d.file.suffix or 'no suffix'})" if d.reason == NOT_MEDIA else d.reason for d in self.dropped if not d.fault
        )
        text += [f"not used: {count} x {reason}" for reason, count in sorted(others.items())]
        if self.captionless:
            some = ", ".join(f.name for f in self.captionless[:3])
            text.append(f"warning: {len(self.captionless)} files have no caption and train with an empty one, such as {some}")
        if self.maskless:
            some = ", ".join(f.name for f in self.maskless[:3])
            text.append(f"warning: {len(self.maskless)} files have no mask and train as a whole, such as {some}")
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
    fits: Callable[[Collection[Bucket]], None] = lambda buckets: None,
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[Samples, Report]:
    """The samples of ``folders``, encoded where the cache does not hold them yet.

    All ranks call it together and get the same samples; each scans a share, and encodes as much as it gets to. Faults
    of files are collected, and what could be encoded stays cached whatever the outcome.

    Args:
        exchange: gathers every rank's value, in the order of ranks.
        again: encode what the cache holds too.
        fits: told of the buckets before anything is encoded; raises where one cannot train.
        lap: told the name of each phase when it is over.

    Raises:
        DiffpipeError: on every rank alike: with ``on_error: fail``, one that lists all faults; when no sample is
            left; when the cache cannot be written.
    """
    memory = Remembered(cache_folder(config) / "files.json")
    found = look(config, model, folders, memory, rank, world, exchange, progress)
    entries, misplaced = place(found.clips, config, model, folders)
    lap("scan")
    if entries:
        _agree(exchange, lambda: fits({e.bucket for e in entries}))
        lap("plan")
    cache, missing, faults = _encoded(config, model, tasks_of(entries, model), device, rank, world, exchange, progress, again)
    _agree(exchange, lambda: memory.save(found.clips) if rank == 0 else None)
    spoiled = {e.file: Dropped.of(e.file, faults[k]) for e in entries for k in (e.media, e.mask, e.control) if k in faults}
    kept = [e for e in entries if e.file not in spoiled]
    held = set(tasks_of(kept, model))
    report = Report(
        files=len({e.file for e in kept}),
        samples=len(kept),
        encoded=len(missing & held),
        reused=len(held - missing),
        dropped=found.dropped + misplaced + [spoiled[f] for f in sorted(spoiled)],
        captionless=found.captionless,
        maskless=found.maskless,
        frames={n: taken for f in folders for n in config.data.of(f).frames if (taken := model.geometry.frames(n)) != n},
        damaged=cache.damaged,
        buckets=dict(Counter(e.bucket for e in kept)),
    )
    _judge(report, kept, config, held, cache)
    samples = make_samples(kept, cache, model)
    lap("encode")
    return samples, report


def prepare_prompts(
    config: Config,
    model: DiffusionModel,
    entries: Sequence[Prompt],
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange = lambda value: [value],
    progress: ShowProgress = lambda p: None,
) -> Prompts:
    """The prompts, encoded where the cache does not hold them yet; all ranks call it together.

    Raises:
        DiffpipeError: on every rank alike, when a picture of a prompt cannot be used, or the cache cannot be written.
    """
    cache, _, faults = _encoded(config, model, entries_of(entries), device, rank, world, exchange, progress)
    for fault in faults.values():
        raise fault
    return Prompts(entries, cache)


def _encoded(
    config: Config,
    model: DiffusionModel,
    tasks: Mapping[str, Task],
    device: torch.device,
    rank: int,
    world: int,
    exchange: Exchange,
    progress: ShowProgress,
    again: bool = False,
) -> tuple[Cache, set[str], dict[str, MediaError]]:
    """The cache with all tasks' entries; which it lacked before; and what of them could not be made, by key."""
    folder = cache_folder(config)
    cache = Cache(folder)
    missing = set(tasks) if again else cache.missing(tasks)
    claims = Claims(folder, exchange(os.urandom(8).hex())[0])
    encoder = Encoder(config, model, device, claims, rank, world, progress)
    shares = _agree(exchange, lambda: encoder.run([t for k, t in tasks.items() if k in missing]))
    encoder.end(shares)
    cache.refresh()
    _agree(exchange, lambda: _settle(cache, claims) if rank == 0 else None)
    return cache, missing, {key: fault for share in shares for key, fault in share.faults.items()}


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
    """What the folders hold.

    Raises:
        ConfigError: when a folder has control pictures that the family has no use for, or lacks those it needs.
    """
    for f in folders:
        if (f.controls is not None) != model.takes_controls:
            told = f"needs control pictures, and {f.path} names none" if model.takes_controls else "has no use for control pictures"
            fix = "name their folder" if model.takes_controls else "take the key out"
            raise ConfigError(f"{model.name} {told}", where="data.folders.controls", fix=fix)
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
    empty = text_key("", model) if any(e.dropout for e in entries) else None
    return Samples(entries, cache, empty, model.geometry.spatial)


def _settle(cache: Cache, claims: Claims) -> None:
    cache.write_index()
    claims.close()


def place(
    clips: Sequence[Clip], config: Config, model: DiffusionModel, folders: Sequence[FolderBase]
) -> tuple[list[Sample], list[Dropped]]:
    """One sample for each clip, part of it and resolution, with the keys of its entries; what is too short, and why."""
    options = [config.data.of(f) for f in folders]
    buckets = [make_buckets(o, model.geometry) for o in options]
    seen_by, rate = model.identity("media"), model.geometry.fps
    keys: dict[str, str] = {}
    entries, dropped = [], []
    for clip in clips:
        said = options[clip.folder].captions
        for span in clip.spans:
            try:
                placed = buckets[clip.folder].place(clip.info, span.start, span.end)
            except MediaError as fault:
                dropped.append(Dropped.of(clip.file, fault))
                continue
            shown = tuple(v for text in span.texts or ("",) for v in variants(text, said))
            for text in shown:
                keys.setdefault(text, text_key(text, model))
            for bucket, start in ((p.bucket, p.start) for p in placed):
                when = "" if start is None else f" from {start:.6f} s at {rate:g} fps"
                mask = control = None
                if clip.mask is not None:
                    mask = key_of("mask", clip.mask[1], f"{bucket.height}x{bucket.width} cells {model.geometry.spatial} pixels {MASKS}")
                if clip.control is not None:
                    control = key_of("media", clip.control[1], f"{bucket} centre pixels {PIXELS}", seen_by)
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
                        control=control,
                        control_file=clip.control[0] if clip.control is not None else None,
                        source=(clip.info.height, clip.info.width),
                        start=start,
                        dropout=said.dropout,
                    )
                )
    return entries, dropped


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


def _agree(exchange: Exchange, work: Callable[[], T]) -> list[T]:
    """Do this rank's share; afterwards all ranks go on with everyone's results, or all raise what one of them met."""
    mine: tuple[T | None, DiffpipeError | None]
    try:
        mine = (work(), None)
    except DiffpipeError as fault:
        mine = (None, fault)
    shares = exchange(mine)
    for _, fault in shares:
        if fault is not None:
            raise fault
    return [share for share, _ in shares]
