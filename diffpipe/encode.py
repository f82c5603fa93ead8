"""Act one: folders of media and captions become a cache of tensors; what is cached already is not touched."""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpipe.config.schema import Config, FolderConfig
from diffpipe.data.buckets import Bucket, make_buckets
from diffpipe.data.cache import Cache, ShardWriter, key_of
from diffpipe.data.dataset import Sample, Samples
from diffpipe.data.media import PIXELS, read
from diffpipe.data.scan import NOT_MEDIA, Clip, Dropped, Exchange, Remembered, scan
from diffpipe.errors import DiffpipeError, MediaError
from diffpipe.models.base import DiffusionModel

AHEAD = 2  # files decoded while another is encoded


@dataclass(frozen=True)
class EncodeProgress:
    """How far one rank's share of a task is.

    Attributes:
        task: "scan", "encode media" or "encode captions".
        samples_per_second: since the task began.
    """

    task: str
    done: int
    total: int
    rank: int
    samples_per_second: float


ShowProgress = Callable[[EncodeProgress], None]


@dataclass
class Report:
    """What became of the files, over all ranks.

    Attributes:
        files: media files that became samples.
        samples: one for each file and resolution.
        encoded, reused: entries of media and captions made now, and found in the cache.
        dropped: files left out, each with its reason.
        damaged: cache shards that could not be read; what they held was made again.
    """

    files: int = 0
    samples: int = 0
    encoded: int = 0
    reused: int = 0
    dropped: list[Dropped] = field(default_factory=list)
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
        text += [f"left out: {d.path}: {d.reason}" for d in self.faults]
        others = Counter(
            f"{d.reason} ({d.path.suffix or 'no suffix'})" if d.reason == NOT_MEDIA else d.reason for d in self.dropped if not d.fault
        )
        text += [f"not used: {count} x {reason}" for reason, count in sorted(others.items())]
        text += [f"damaged cache shard, not used: {path}" for path in self.damaged]
        return text


def prepare_data(
    config: Config,
    model: DiffusionModel,
    folders: Sequence[FolderConfig],
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange = lambda value: [value],
    progress: ShowProgress = lambda p: None,
) -> tuple[Samples, Report]:
    """The samples of ``folders``, encoded where the cache does not hold them yet.

    All ranks call it together and get the same samples; each scans and encodes a share. Faults of files are
    collected, and what could be encoded stays cached whatever the outcome.

    Args:
        exchange: gathers every rank's value, in the order of ranks.

    Raises:
        DiffpipeError: on every rank alike: with ``on_error: fail``, one that lists all faults; when no sample is
            left; when the cache cannot be written.
    """
    folder = cache_folder(config)
    memory = Remembered(folder / "files.json")
    found = scan(
        folders,
        takes_video=model.geometry.fps is not None,
        memory=memory,
        rank=rank,
        world=world,
        exchange=exchange,
        progress=_clocked("scan", rank, progress),
    )
    entries, misplaced = _place(found.clips, config, model)
    cache = Cache(folder)
    wanted = {e.media for e in entries} | {e.text for e in entries}
    missing = {k for k in wanted if k not in cache}
    encoder = _Encoder(config, model, device, missing, rank, world, progress)
    faults = _agree(exchange, lambda: encoder.run(entries))
    _agree(exchange, lambda: memory.save((c.path, c.info, c.digest) for c in found.clips) if rank == 0 else None)
    cache.refresh()
    bad = {d.path for d in faults}
    kept = [e for e in entries if e.path not in bad]
    dropped = found.dropped + misplaced + sorted(faults, key=lambda d: d.path)
    held = {e.media for e in kept} | {e.text for e in kept}
    report = Report(
        files=len({e.path for e in kept}),
        samples=len(kept),
        encoded=len(missing & held),
        reused=len(held - missing),
        dropped=dropped,
        damaged=cache.damaged,
        buckets=dict(Counter(e.bucket for e in kept)),
    )
    _judge(report, kept, config, held, cache)
    return Samples(kept, cache.only(held)), report


def cache_folder(config: Config) -> Path:
    return config.data.cache_dir or config.output_dir / "cache"


def _place(clips: Sequence[Clip], config: Config, model: DiffusionModel) -> tuple[list[Sample], list[Dropped]]:
    """One sample for each clip and resolution, with the keys of its entries."""
    buckets = make_buckets(config.data, model.geometry)
    seen_by, said_by = model.identity("media"), model.identity("text")
    entries, dropped = [], []
    for clip in clips:
        try:
            for bucket in buckets.place(clip.info):
                rate = f" start at {model.geometry.fps:g} fps" if clip.info.kind == "video" else ""
                media = key_of("media", clip.digest, f"{bucket} centre{rate} pixels {PIXELS}", seen_by)
                text = key_of("text", clip.caption, said_by)
                source = (clip.info.height, clip.info.width)
                entries.append(Sample(clip.path, clip.caption, bucket, clip.repeats, media, text, source))
        except MediaError as fault:
            dropped.append(Dropped.of(clip.path, fault))
    return entries, dropped


def _judge(report: Report, kept: list[Sample], config: Config, held: set[str], cache: Cache) -> None:
    """Raise when the data cannot be trained on as the config wants it."""
    faults = report.faults
    if faults and config.data.on_error == "fail":
        listed = "\n".join(f"  {d.path}: {d.reason}" for d in faults)
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
    lost = [k for k in held if k not in cache]
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


class _Encoder:
    """Encodes one rank's share of the missing entries."""

    def __init__(
        self, config: Config, model: DiffusionModel, device: torch.device, missing: set[str], rank: int, world: int, progress: ShowProgress
    ) -> None:
        self._config, self._model, self._device, self._missing = config, model, device, missing
        self._rank, self._world, self._progress = rank, world, progress

    def run(self, entries: Sequence[Sample]) -> list[Dropped]:
        """Write the share; gives the files that could not be decoded. The encoders are in memory only meanwhile."""
        media = self._share({e.media: e for e in sorted(entries, key=lambda e: e.bucket)})
        texts = self._share({e.text: e for e in entries})
        if not media and not texts:
            return []
        encoders = self._model.load_encoders(self._device)
        try:
            with torch.inference_mode(), ShardWriter(cache_folder(self._config)) as writer:
                faults = self._media(media, encoders, writer)
                self._texts(texts, encoders, writer)
        finally:
            del encoders
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return faults

    def _share(self, by_key: dict[str, Sample]) -> list[Sample]:
        return [e for k, e in by_key.items() if k in self._missing][self._rank :: self._world]

    def _media(self, share: list[Sample], encoders: Any, writer: ShardWriter) -> list[Dropped]:
        shown = _clocked("encode media", self._rank, self._progress)
        faults: dict[Path, Dropped] = {}
        done = 0
        for group in _groups(self._decoded(share, faults), self._config.data.encode_batch):
            pixels = [p for _, p in group if p is not None]
            if pixels:
                made = self._model.encode_media(encoders, torch.stack(pixels).to(self._device))
                for i, (entry, _) in enumerate(group):
                    writer.add(entry.media, {name: tensor[i] for name, tensor in made.items()})
            done += len(group)
            shown(done, len(share))
        return list(faults.values())

    def _decoded(self, share: list[Sample], faults: dict[Path, Dropped]) -> Iterator[tuple[Sample, Tensor | None]]:
        """Each entry with its pixels, or None when they cannot be read; a few files ahead of the one asked for."""
        waiting: deque[tuple[Sample, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(AHEAD) as pool:
            rest = iter(share)
            while True:
                while len(waiting) < AHEAD and (entry := next(rest, None)) is not None:
                    waiting.append((entry, pool.submit(read, entry.path, entry.bucket, self._model.geometry.fps)))
                if not waiting:
                    return
                entry, pixels = waiting.popleft()
                try:
                    yield entry, pixels.result()
                except MediaError as fault:
                    faults[entry.path] = Dropped.of(entry.path, fault)
                    yield entry, None

    def _texts(self, share: list[Sample], encoders: Any, writer: ShardWriter) -> None:
        shown = _clocked("encode captions", self._rank, self._progress)
        step = self._config.data.encode_batch
        for first in range(0, len(share), step):
            group = share[first : first + step]
            made = self._model.encode_text(encoders, [e.caption for e in group])
            for i, entry in enumerate(group):
                writer.add(entry.text, {name: tensor[i] for name, tensor in made.items()})
            shown(first + len(group), len(share))


def _groups(entries: Iterator[tuple[Sample, Tensor | None]], size: int) -> Iterator[list[tuple[Sample, Tensor | None]]]:
    """Consecutive entries that can be encoded at once: same bucket, at most ``size``; unreadable ones by themselves."""
    for _, run in groupby(entries, key=lambda pair: (pair[0].bucket, pair[1] is None)):
        group: list[tuple[Sample, Tensor | None]] = []
        for pair in run:
            group.append(pair)
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group


def _clocked(task: str, rank: int, progress: ShowProgress) -> Callable[[int, int], None]:
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        progress(EncodeProgress(task, done, total, rank, done / max(time.monotonic() - began, 1e-6)))

    return show
