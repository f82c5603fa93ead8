"""Finds every file of the data folders that can become samples, and says of each other one why it cannot."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath

from diffpipe.config.schema import FolderBase, MediaConfig
from diffpipe.data import captions
from diffpipe.data.cache import writing_to
from diffpipe.data.captions import Captions, Span
from diffpipe.data.files import TAR, File, folders_in, members, walk
from diffpipe.data.media import MediaInfo, kind_of, probe
from diffpipe.durable import write_durably
from diffpipe.errors import ConfigError, DiffpipeError, MediaError

NOT_MEDIA = "not media"
Exchange = Callable[[object], list]  # every rank's value, in the order of ranks


@dataclass(frozen=True)
class Clip:
    """A media file with its captions.

    Attributes:
        digest: hash of the file's bytes.
        stamp: the file's, before they were read.
        spans: what of it trains, with captions; a file without any has one span without text.
        folder: which of the config's folders it is from.
        mask: what of its picture trains, with the hash of the mask's bytes.
        control: the picture it is made from, with the hash of its bytes.
    """

    file: File
    info: MediaInfo
    digest: str
    stamp: list[int]
    spans: tuple[Span, ...]
    folder: int
    mask: tuple[File, str] | None = None
    control: tuple[File, str] | None = None


@dataclass(frozen=True)
class Dropped:
    """A file left out. ``fault`` tells what the user should mend from what is merely not for this model."""

    file: File
    reason: str
    fault: bool = True

    @classmethod
    def of(cls, file: File, fault: MediaError) -> Dropped:
        """In one line; another file than ``file`` that is at fault (its caption) is named."""
        other = Path(fault.where).name if fault.where not in ("", str(file)) else ""
        wanted = f", expected {fault.expected}" if fault.expected else ""
        cure = f" ({fault.fix})" if fault.fix else ""
        return cls(file, f"{f'{other}: ' if other else ''}{fault.found}{wanted}{cure}")


@dataclass
class Found:
    """What the folders hold.

    Attributes:
        captionless: files that train without a caption, for they have none.
        maskless: files that train as a whole, for their folder's masks have none for them.
    """

    clips: list[Clip] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    captionless: list[File] = field(default_factory=list)
    maskless: list[File] = field(default_factory=list)


class Remembered:
    """What earlier scans found in files, by path, size and time of change, so that no file is hashed twice."""

    VERSION = 3

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list] = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept.get("version") == self.VERSION:
                self._known = kept["files"]
        except (OSError, ValueError, AttributeError):
            pass  # a missing or damaged memory costs time only

    def look(self, file: File) -> tuple[MediaInfo, str, list[int]]:
        """What a file holds, the hash of its bytes, read only when it changed, and its stamp."""
        known, stamp = self._known.get(_absolute(file)), file.stamp()
        if known is not None and known[0] == stamp:
            return MediaInfo(**known[2]), known[1], stamp
        return probe(file), file.digest(), stamp

    def save(self, clips: Iterable[Clip]) -> None:
        """Add what was found."""
        fresh = {_absolute(c.file): [c.stamp, c.digest, asdict(c.info)] for c in clips}
        if all(self._known.get(k) == v for k, v in fresh.items()):
            return
        self._known |= fresh
        with writing_to(self._file.parent):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._file, json.dumps({"version": self.VERSION, "files": self._known}).encode())


def _absolute(file: File) -> str:
    return f"{os.path.abspath(file.path)}/{file.member}" if file.member else os.path.abspath(file.path)


@dataclass(frozen=True)
class _Work:
    """A media file to look at, and what its folder says of it."""

    file: File
    folder: int
    spans: tuple[Span, ...] | MediaError
    mask: File | None
    control: File | None


def scan(
    folders: Sequence[FolderBase],
    options: Callable[[FolderBase], MediaConfig],
    *,
    takes_video: bool,
    memory: Remembered,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange = lambda value: [value],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Look at every file of the folders, each rank at a share; all ranks get the same answer.

    Args:
        options: what holds for a folder.
        takes_video: whether the family trains on videos.
        memory: what is known of unchanged files.
        exchange: gathers every rank's value; called by all ranks.

    Raises:
        DiffpipeError: when a folder is missing, none holds any media, or a list of captions cannot be read.
    """
    found = Found()
    work: list[_Work] = []
    for number, folder in enumerate(folders):
        work += _listed(number, folder, options(folder), found)
    if not work:
        where = ", ".join(f.path for f in folders)
        raise DiffpipeError(
            "no image or video in the data folders",
            where=where,
            expected="media files or .tar shards in the folder",
            fix="check data.folders, or set recursive where they lie in folders of their own",
        )
    share = work[rank::world]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked: list[Clip | Dropped] = []
        for one in pool.map(lambda item: _examine(item, takes_video, memory), share):
            looked.append(one)
            progress(len(looked), len(share))
    shares = exchange(looked)
    for i in range(len(work)):
        one: Clip | Dropped = shares[i % world][i // world]
        if isinstance(one, Dropped):
            found.dropped.append(one)
            continue
        found.clips.append(one)
        if any(not span.texts for span in one.spans):
            found.captionless.append(one.file)
        if one.mask is None and folders[one.folder].masks is not None:
            found.maskless.append(one.file)
    return found


def _listed(number: int, folder: FolderBase, options: MediaConfig, found: Found) -> list[_Work]:
    """The media of one folder with their captions, masks and controls; what else lies there goes to ``found``."""
    place = Path(folder.path)
    masks = _pictures(folder.masks, "masks", place, options.recursive)
    controls = _pictures(folder.controls, "controls", place, options.recursive)
    try:
        files = list(walk(place, options.recursive, [f for f in (folder.masks, folder.controls) if f is not None]))
        found.dropped += [Dropped(File(p), "a folder in a folder, searched only with recursive", False) for p in folders_in(place)][
            : 0 if options.recursive else None
        ]
    except OSError as fault:
        where = str(fault.filename or place)  # maybe one inside
        raise ConfigError(f"the folder cannot be read: {fault.strerror or fault}", where=where, fix="check data.folders") from fault
    groups = [[f for f in files if f.suffix != TAR]]
    for shard in (f for f in files if f.suffix == TAR):
        try:
            groups.append(members(shard.path))
        except MediaError as fault:
            found.dropped.append(Dropped.of(shard, fault))
    work: list[_Work] = []
    for group in groups:
        texts = captions.collect(group, options.captions)
        media = [f for f in group if kind_of(f)]
        twins = _twins(media)
        for file in media:
            spans = _spans(file, texts, options, twins)
            mask, control = (_picture_of(file, place, pictures) for pictures in (masks, controls))
            if folder.controls is not None and control is None:
                spans = MediaError("has no control picture", expected=f"one called {file.stem} in {folder.controls}")
            work.append(_Work(file, number, spans, mask, control))
        stems = {(f.folder, f.stem) for f in media}
        for file in group:
            if kind_of(file):
                continue
            if not captions.is_caption(file, options.captions):
                found.dropped.append(Dropped(file, NOT_MEDIA, fault=False))
            elif file.name not in captions.LISTS and (file.folder, file.stem) not in stems:
                found.dropped.append(Dropped(file, "a caption without media", fault=False))
    known = {f for w in work for f in (w.mask, w.control)}
    for what, pictures in (("mask", masks), ("control", controls)):
        found.dropped += [Dropped(f, f"a {what} without media", fault=False) for f in pictures.values() if f not in known]
    return work


def _pictures(folder: Path | None, what: str, media: Path, recursive: bool) -> dict[PurePath, File]:
    """The pictures of a folder of masks or controls by path from there, without suffix."""
    if folder is None:
        return {}
    try:
        return {_inside(f, folder): f for f in walk(folder, recursive, [media]) if kind_of(f) == "image"}
    except OSError as fault:
        raise ConfigError(f"the folder of {what} cannot be read: {fault.strerror or fault}", where=str(folder)) from fault


def _picture_of(file: File, place: Path, pictures: dict[PurePath, File]) -> File | None:
    """The mask or control of a media file: at its own path, or at the top under its stem."""
    return pictures.get(_inside(file, place)) or pictures.get(PurePath(file.stem))


def _inside(file: File, place: Path) -> PurePath:
    """Where in a folder or tar file it lies, without suffix."""
    return PurePath(file.folder).relative_to(file.path if file.member else place) / file.stem


def _twins(media: Sequence[File]) -> dict[tuple[str, str], list[str]]:
    """Media files that share one stem."""
    by_stem: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in media:
        by_stem[file.folder, file.stem].append(file.name)
    return {place: names for place, names in by_stem.items() if len(names) > 1}


def _spans(file: File, texts: Captions, options: MediaConfig, twins: dict[tuple[str, str], list[str]]) -> tuple[Span, ...] | MediaError:
    place = (file.folder, file.stem)
    if place in twins and place in texts.beside:
        others = ", ".join(n for n in twins[place] if n != file.name)
        return MediaError(f"shares its caption {texts.beside[place].name} with {others}", fix="give each file a stem of its own")
    try:
        return tuple(texts.of(file, options.captions)) or (Span(()),)
    except MediaError as fault:
        return fault
    except OSError as fault:
        return MediaError(f"its caption cannot be read: {fault.strerror or fault}")


def _examine(work: _Work, takes_video: bool, memory: Remembered) -> Clip | Dropped:
    file = work.file
    if kind_of(file) == "video" and not takes_video:
        return Dropped(file, "a video, but this model family trains on images only", fault=False)
    if isinstance(work.spans, MediaError):
        return Dropped.of(file, work.spans)
    try:
        info, digest, stamp = memory.look(file)
        mask, control = ((f, f.digest()) if f is not None else None for f in (work.mask, work.control))
    except MediaError as fault:
        return Dropped.of(file, fault)
    except OSError as fault:
        return Dropped(file, f"cannot be read: {fault.strerror or fault}")
    if info.kind == "video" and not takes_video:
        return Dropped(file, "a moving picture, but this model family trains on still ones only", fault=False)
    return Clip(file, info, digest, stamp, work.spans, work.folder, mask, control)
