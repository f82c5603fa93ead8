"""Keeps encoded samples in safetensors shards: each entry found by its content key, mapped into memory, never rewritten."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpipe.errors import DiffpipeError

UNFINISHED = ".unfinished-"
FORMAT = {"format": "diffpipe-cache-1"}
DAY = 24 * 3600.0


def key_of(*parts: str) -> str:
    """The content key of an entry: equal exactly when all of what made it is equal."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Cache:
    """The finished entries of a folder, read through memory maps.

    A shard's own header lists its entries (tensors named ``KEY.NAME``), so there is no index file that could
    disagree with the shards: opening the cache reads the headers. Travels to loader workers, which map the shards anew.

    Attributes:
        damaged: shards that cannot be read; what they held counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._index: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._seen: set[str] = set()
        self._open: dict[str, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take up shards finished since the cache was opened."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                with safe_open(path, "pt") as shard:
                    names: list[str] = list(shard.keys()) if shard.metadata() == FORMAT else []
            except (SafetensorError, OSError):
                self.damaged.append(path)
                continue
            held: dict[str, list[str]] = {}
            for name in names:
                key, _, tensor = name.partition(".")
                held.setdefault(key, []).append(tensor)
            for key, tensors in held.items():
                self._index.setdefault(key, (path.name, tuple(tensors)))

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, mapped from the file.

        Raises:
            DiffpipeError: when the shard was removed or damaged after the cache was opened.
        """
        shard, names = self._index[key]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.folder / shard, "pt")
            return {name: self._open[shard].get_tensor(f"{key}.{name}") for name in names}
        except (SafetensorError, OSError) as fault:
            raise DiffpipeError(
                f"a shard of the cache is gone or damaged: {fault}", where=str(self.folder / shard), fix="run again to encode what it held"
            ) from fault

    def only(self, keys: set[str]) -> Cache:
        """The same cache knowing nothing but ``keys``, light enough to send to workers."""
        light = Cache.__new__(Cache)
        light.folder, light.damaged, light._seen, light._open = self.folder, self.damaged, self._seen, {}
        light._index = {k: self._index[k] for k in keys}
        return light

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class ShardWriter:
    """Collects entries and writes them as shards, each beside its final name and then renamed.

    A shard is finished when it holds ``limit`` bytes or after ``seconds``: that much work a killed process loses.
    Names are unique, so any number of processes may write into one folder.

    Raises:
        DiffpipeError: when the disk is full or the folder cannot be written; finished shards stay.
    """

    def __init__(self, folder: Path, *, limit: int = 256 << 20, seconds: float = 30.0) -> None:
        self._folder, self._limit, self._seconds = folder, limit, seconds
        self._pending: dict[str, Tensor] = {}
        self._bytes, self._since = 0, time.monotonic()
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry; its tensors are copied, so that they may be views of a batch on any device."""
        for name, tensor in tensors.items():
            held = tensor.detach().to("cpu", copy=True).contiguous()
            self._pending[f"{key}.{name}"] = held
            self._bytes += held.nbytes
        if self._bytes >= self._limit or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Finish a shard of what was added."""
        if self._pending:
            name = uuid.uuid4().hex
            with writing_to(self._folder):
                write_durably(self._folder / f"{name}.safetensors", safetensors.torch.save(self._pending, FORMAT))
        self._pending, self._bytes, self._since = {}, 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        # What is encoded stays, also when the user interrupts or a later sample fails; a full disk has nothing to add.
        if not isinstance(fault, DiffpipeError):
            self.flush()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for less than all of it; nothing is left behind when it fails."""
    aside = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")  # others may be writing the same file
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Tells of a disk that is full or cannot be written in the user's words."""
    try:
        yield
    except OSError as fault:
        raise DiffpipeError(
            f"the cache cannot be written: {fault.strerror or fault}",
            where=str(folder),
            fix="free some space or set data.cache_dir to another disk, then run again; what was encoded so far stays",
        ) from fault


def _sweep(folder: Path) -> None:
    """Remove what processes that died while writing left, unless it is young enough to be another run's work."""
    for path in folder.glob(f"{UNFINISHED}*"):
        try:
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()
        except OSError:
            continue  # another process removed it first
