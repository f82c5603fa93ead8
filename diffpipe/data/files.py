"""Where the bytes of a media file lie: in a file of its own, or inside a tar shard, which is read in place."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from diffpipe.errors import MediaError

TAR = ".tar"


@dataclass(frozen=True, order=True)
class File:
    """A file on disk, or a member of a tar file.

    Attributes:
        path: on disk.
        member: name inside the tar file, empty for a file of its own.
        offset, size: where the member's bytes lie in the tar file.
    """

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name if self.member else self.path.name

    @property
    def suffix(self) -> str:
        """With its dot, in lower case."""
        return (PurePosixPath(self.member).suffix if self.member else self.path.suffix).lower()

    @property
    def stem(self) -> str:
        """What it shares with its caption and mask. In a tar file that is the name up to its first dot, as WebDataset has it."""
        return self.name.partition(".")[0] if self.member else self.path.stem

    @property
    def folder(self) -> str:
        """What its caption and mask share with it beside the stem."""
        return f"{self.path}/{PurePosixPath(self.member).parent}" if self.member else str(self.path.parent)

    def open(self) -> BinaryIO:
        """The bytes as a stream that can seek."""
        return io.BytesIO(self.read()) if self.member else open(self.path, "rb")

    def read(self) -> bytes:
        """All bytes."""
        with open(self.path, "rb") as file:
            if not self.member:
                return file.read()
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise MediaError("the tar file ends inside it", where=str(self), fix="download the shard again")
        return content

    def digest(self) -> str:
        """Hash of the bytes."""
        digest = blake2b(digest_size=16)
        with self.open() as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def stamp(self) -> list[int]:
        """Changes whenever the bytes may have changed: sizes, place, and the time of the last change."""
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns, self.offset, self.size]


def walk(folder: Path, recursive: bool, without: Iterable[Path] = ()) -> Iterator[File]:
    """Files of a folder by name, without hidden ones; folders in it too where ``recursive``, each once whatever links say.

    Args:
        without: folders in it that are not searched.

    Raises:
        OSError: when a folder cannot be read.
    """
    seen = {_identity(p) for p in without if p.exists()} - {_identity(folder)}

    def inside(place: Path) -> Iterator[File]:
        here = _identity(place)
        if here in seen and here[1]:
            return  # a link that leads back to where it lies
        seen.add(here)
        for entry in sorted(os.scandir(place), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            path = place / entry.name
            # Asked about a link to itself, an entry raises.
            if not (path.is_dir() if entry.is_symlink() else entry.is_dir()):
                yield File(path)
            elif recursive:
                yield from inside(path)

    yield from inside(folder)


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def folders_in(folder: Path) -> list[Path]:
    """Folders that a search of this folder alone leaves out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def members(path: Path) -> list[File]:
    """The files in a tar file, in their order there.

    Raises:
        MediaError: when it is no tar file, or ends early.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return [File(path, m.name, m.offset_data, m.size) for m in tar if m.isfile() and not PurePosixPath(m.name).name.startswith(".")]
    except (tarfile.TarError, EOFError, ValueError) as fault:
        raise MediaError(
            f"not a readable tar file: {fault}", where=str(path), expected="an uncompressed .tar", fix="download it again, or unpack it"
        ) from fault
