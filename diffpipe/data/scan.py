"""Finds every file of the data folders that can become samples, and says of each other one why it cannot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

from diffpipe.config.schema import FolderConfig
from diffpipe.data.cache import write_durably, writing_to
from diffpipe.data.media import MediaInfo, kind_of, probe
from diffpipe.errors import ConfigError, DiffpipeError, MediaError

NOT_MEDIA = "not media"
Exchange = Callable[[object], list]  # every rank's value, in the order of ranks


@dataclass(frozen=True)
class Clip:
    """A media file with its caption.

    Attributes:
        digest: hash of the file's bytes.
        repeats: times it is seen in an epoch.
    """

    path: Path
    info: MediaInfo
    digest: str
    caption: str
    repeats: int


@dataclass(frozen=True)
class Dropped:
    """A file left out. ``fault`` tells what the user should mend from what is merely not for this model."""

    path: Path
    reason: str
    fault: bool = True

    @classmethod
    def of(cls, path: Path, fault: MediaError) -> Dropped:
        """In one line; another file than ``path`` that is at fault (its caption) is named."""
        other = Path(fault.where).name if fault.where not in ("", str(path)) else ""
        wanted = f", expected {fault.expected}" if fault.expected else ""
        cure = f" ({fault.fix})" if fault.fix else ""
        return cls(path, f"{f'{other}: ' if other else ''}{fault.found}{wanted}{cure}")


@dataclass
class Found:
    clips: list[Clip] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


class Remembered:
    """What earlier scans found in files, by path, size and time of change, so that no file is hashed twice."""

    VERSION = 1

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list] = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept.get("version") == self.VERSION:
                self._known = kept["files"]
        except (OSError, ValueError, AttributeError):
            pass  # a missing or damaged memory costs time only

    def look(self, path: Path) -> tuple[MediaInfo, str] | None:
        known = self._known.get(str(path.resolve()))
        if known is None or known[:2] != _stamp(path):
            return None
        return MediaInfo(**known[3]), known[2]

    def save(self, clips: Iterable[tuple[Path, MediaInfo, str]]) -> None:
        """Add what was found."""
        fresh = {str(path.resolve()): [*_stamp(path), digest, asdict(info)] for path, info, digest in clips}
        if all(self._known.get(k) == v for k, v in fresh.items()):
            return
        self._known |= fresh
        with writing_to(self._file.parent):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._file, json.dumps({"version": self.VERSION, "files": self._known}).encode())


def scan(
    folders: Sequence[FolderConfig],
    *,
    takes_video: bool,
    memory: Remembered,
    rank: int = 0,
    world: int = 1,
    exchange: Exchange = lambda value: [value],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Look at every file of the folders (not of folders in them), each rank at a share; all ranks get the same answer.

    Args:
        takes_video: whether the family trains on videos.
        memory: what is known of unchanged files.
        exchange: gathers every rank's value; called by all ranks.

    Raises:
        DiffpipeError: when a folder is missing, or none holds any media.
    """
    found = Found()
    work: list[tuple[Path, int]] = []
    for folder in folders:
        media, rest = list_media(Path(folder.path))
        found.dropped += rest
        work += [(path, folder.repeats) for path in media]
    if not work:
        where = ", ".join(f.path for f in folders)
        raise DiffpipeError(
            "no image or video in the data folders", where=where, expected="media files directly in the folder", fix="check data.folders"
        )
    share = work[rank::world]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked: list[Clip | Dropped] = []
        for one in pool.map(lambda item: _examine(item[0], item[1], takes_video, memory), share):
            looked.append(one)
            progress(len(looked), len(share))
    shares = exchange(looked)
    for i in range(len(work)):
        one: Clip | Dropped = shares[i % world][i // world]
        if isinstance(one, Clip):
            found.clips.append(one)
        else:
            found.dropped.append(one)
    return found


def list_media(folder: Path) -> tuple[list[Path], list[Dropped]]:
    """Media files of a folder by name, and what else lies there; hidden files are not looked at."""
    try:
        files = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as fault:
        raise ConfigError(f"the folder cannot be read: {fault.strerror or fault}", where=str(folder), fix="check data.folders") from fault
    media = [p for p in files if p.is_file() and kind_of(p)]
    captions = {p.with_suffix("").name for p in media}
    rest = []
    for path in files:
        if path.is_dir():
            rest.append(Dropped(path, "a folder in a data folder is not searched", fault=False))
        elif path.suffix.lower() == ".txt":
            if path.stem not in captions:
                rest.append(Dropped(path, "a caption without media", fault=False))
        elif not kind_of(path):
            rest.append(Dropped(path, NOT_MEDIA, fault=False))
    return media, rest


def _examine(path: Path, repeats: int, takes_video: bool, memory: Remembered) -> Clip | Dropped:
    if kind_of(path) == "video" and not takes_video:
        return Dropped(path, "a video, but this model family trains on images only", fault=False)
    try:
        caption = read_caption(path.with_suffix(".txt"))
        info, digest = memory.look(path) or (probe(path), digest_of(path))
    except MediaError as fault:
        return Dropped.of(path, fault)
    except OSError as fault:
        return Dropped(path, f"cannot be read: {fault.strerror or fault}")
    return Clip(path, info, digest, caption, repeats)


def read_caption(path: Path) -> str:
    """The caption in a file, without surrounding white space.

    Raises:
        MediaError: when it is missing, empty or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError as fault:
        raise MediaError("no caption file", where=str(path), fix="write the caption into it") from fault
    except UnicodeDecodeError as fault:
        raise MediaError(f"byte {fault.start} of the caption is not UTF-8", where=str(path), fix="save it as UTF-8") from fault
    if not text:
        raise MediaError("the caption is empty", where=str(path), fix="write the caption into it")
    return text


def digest_of(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
