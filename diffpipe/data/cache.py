"""Keeps encoded samples in safetensors shards: each entry found by its content key, mapped into memory, never rewritten in place."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpipe.durable import UNFINISHED, write_durably
from diffpipe.errors import DiffpipeError, told_of_disk

FORMAT = "diffpipe-cache-2"
INDEX = "index.bin"
DAY = 24 * 3600.0
HANDLES = 128  # shards held open at once by one process
BLANK = "0" * 32


def key_of(*parts: str) -> str:
    """The content key of an entry: equal exactly when all of what made it is equal. 32 hexadecimal digits."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Cache:
    """The finished entries of a folder, read through memory maps.

    A shard's own header lists its entries (tensors named ``KEY.NAME``) and has the hash of its bytes. The index, which is
    mapped too, only spares reading every header: shards that it does not list are taken up from theirs, and shards that
    are gone, or of another size than it says, count as missing. Travels to loader workers as the name of its folder.

    Attributes:
        damaged: shards that cannot be read; what they held counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._index = _Index.read(folder / INDEX)
        self._fresh: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._seen: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()
        sizes = _sizes(folder)
        for name in self._index.check(sizes):
            if name in sizes:
                self.damaged.append(folder / name)
            self._seen.add(name)
        self._seen |= set(self._index.shards)
        self.refresh()

    def refresh(self) -> None:
        """Take up shards finished since the cache was opened."""
        for name in sorted(_sizes(self.folder)):
            if name in self._seen:
                continue
            self._seen.add(name)
            try:
                held = _held(self.folder / name)
            except (SafetensorError, OSError, ValueError):
                self.damaged.append(self.folder / name)
                continue
            for key, tensors in held.items():
                self._fresh.setdefault(key, (name, tensors))

    def write_index(self) -> None:
        """Make the index list every shard, so that the next run opens the cache without reading headers."""
        if self._fresh:
            with writing_to(self.folder):
                self._index.merged(self._fresh, _sizes(self.folder)).write(self.folder / INDEX)

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Those of ``keys`` that have no entry."""
        wanted = [k for k in keys if k not in self._fresh]
        return {k for k, place in zip(wanted, self._index.find(wanted).tolist(), strict=True) if place < 0}

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])

    def keys(self) -> set[str]:
        """Every entry's key."""
        return set(self._fresh) | self._index.keys()

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, mapped from the file.

        Raises:
            DiffpipeError: when the shard was removed or damaged after the cache was opened.
        """
        shard, names = self._fresh[key] if key in self._fresh else self._index.place(key)
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.folder / shard, "pt")
                if len(self._open) > HANDLES:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return {name: self._open[shard].get_tensor(f"{key}.{name}") for name in names}
        except (SafetensorError, OSError) as fault:
            raise DiffpipeError(
                f"a shard of the cache is gone or damaged: {fault}",
                where=str(self.folder / shard),
                fix="diffpipe cache CFG --verify removes what is damaged and encodes again what is missing",
            ) from fault

    def verify(self) -> list[Path]:
        """Read every shard, and remove those whose bytes are not what was written; gives their paths."""
        bad = [p for p in sorted(self.folder.glob("*.safetensors")) if not _intact(p)]
        for path in bad:
            path.unlink(missing_ok=True)
        return bad

    def prune(self, keep: Collection[str]) -> int:
        """Remove every entry but ``keep``; gives the bytes that became free. Shards in part of use are written anew."""
        kept, before = set(keep), sum(_sizes(self.folder).values())
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                held = _held(path)
            except (SafetensorError, OSError, ValueError):
                path.unlink(missing_ok=True)
                continue
            stay = [key for key in held if key in kept]
            if len(stay) == len(held):
                continue
            if stay:
                with ShardWriter(self.folder) as writer, safe_open(path, "pt") as shard:
                    for key in stay:
                        writer.add(key, {name: shard.get_tensor(f"{key}.{name}") for name in held[key]})
            path.unlink()
        with writing_to(self.folder):
            (self.folder / INDEX).unlink(missing_ok=True)
        return before - sum(_sizes(self.folder).values())

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)


class _Index:
    """Keys in order, and for each the shard and the names of its tensors, in arrays that are mapped rather than read."""

    def __init__(self, about: dict[str, Any], arrays: tuple[np.ndarray, ...]) -> None:
        self.shards: dict[str, int] = about["shards"]  # with their sizes in bytes
        self._shards, self._names = list(self.shards), [tuple(n) for n in about["names"]]
        self._high, self._low, self._shard, self._kind = arrays
        self._usable = np.ones(len(self._shards), bool)

    @classmethod
    def empty(cls) -> _Index:
        return cls({"shards": {}, "names": []}, tuple(np.zeros(0, kind) for kind in cls.KINDS))

    KINDS = ("<u8", "<u8", "<u4", "<u2")

    @classmethod
    def read(cls, path: Path) -> _Index:
        """The index in a file; an empty one when there is none, or none that can be read."""
        try:
            with open(path, "rb") as file:
                about = json.loads(file.readline())
                offset, count = file.tell(), about["count"]
                whole = offset + count * sum(np.dtype(k).itemsize for k in cls.KINDS) == os.fstat(file.fileno()).st_size
            if about["format"] != FORMAT or not whole:
                return cls.empty()
            arrays = []
            for kind in cls.KINDS:
                arrays.append(np.memmap(path, kind, "r", offset, (count,)) if count else np.zeros(0, kind))
                offset += count * np.dtype(kind).itemsize
            return cls(about, tuple(arrays))
        except (OSError, ValueError, KeyError, TypeError):
            return cls.empty()  # what it would have told stands in the shards' headers

    def write(self, path: Path) -> None:
        """Put the index into a file, whole or not at all."""
        about = {"format": FORMAT, "count": len(self._high), "shards": self.shards, "names": self._names}
        line = json.dumps(about, separators=(",", ":")).encode()
        line += b" " * (-(len(line) + 1) % 8) + b"\n"  # the arrays begin at a multiple of their size
        arrays = (self._high, self._low, self._shard, self._kind)
        write_durably(path, line + b"".join(np.asarray(a, k).tobytes() for a, k in zip(arrays, self.KINDS, strict=True)))

    def check(self, sizes: Mapping[str, int]) -> list[str]:
        """Leave out shards that are not there as they were; gives their names."""
        bad = [name for name, size in self.shards.items() if sizes.get(name) != size]
        self._usable = np.array([sizes.get(name) == size for name, size in self.shards.items()], bool)
        return bad

    def find(self, keys: list[str]) -> np.ndarray:
        """The place of each key, -1 where it has none."""
        if not keys or not len(self._high):
            return np.full(len(keys), -1)
        high, low = _halves(keys)
        places = np.searchsorted(self._high, high)
        found = np.full(len(keys), -1)
        # Two keys hardly ever share their first half, but may.
        pending = np.arange(len(keys))
        while len(pending):
            at = places[pending]
            inside = at < len(self._high)
            pending, at = pending[inside], at[inside]
            alike = self._high[at] == high[pending]
            pending, at = pending[alike], at[alike]
            hit = (self._low[at] == low[pending]) & self._usable[self._shard[at]]
            found[pending[hit]] = at[hit]
            pending = pending[~hit]
            places[pending] += 1
        return found

    def place(self, key: str) -> tuple[str, tuple[str, ...]]:
        at = int(self.find([key])[0])
        if at < 0:
            raise KeyError(key)
        return self._shards[self._shard[at]], self._names[self._kind[at]]

    def keys(self) -> set[str]:
        usable = self._usable[self._shard] if len(self._shard) else np.zeros(0, bool)
        return {f"{h:016x}{low:016x}" for h, low in zip(self._high[usable].tolist(), self._low[usable].tolist(), strict=True)}

    def merged(self, fresh: Mapping[str, tuple[str, tuple[str, ...]]], sizes: Mapping[str, int]) -> _Index:
        """This index and entries of shards that it does not list."""
        usable = self._usable[self._shard] if len(self._shard) else np.zeros(0, bool)
        shards = {name: size for name, size in self.shards.items() if sizes.get(name) == size}
        shards |= {name: sizes[name] for name in sorted({s for s, _ in fresh.values()}) if name in sizes}
        number = {name: i for i, name in enumerate(shards)}
        names = list(dict.fromkeys([*self._names, *(n for _, n in fresh.values())]))
        kind = {n: i for i, n in enumerate(names)}
        added = {k: place for k, place in fresh.items() if place[0] in number}
        old = np.array([number.get(name, 0) for name in self._shards], np.uint32)
        high, low = _halves(list(added)) if added else (np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        columns = [
            np.concatenate([self._high[usable], high]),
            np.concatenate([self._low[usable], low]),
            np.concatenate([old[self._shard[usable]], np.array([number[s] for s, _ in added.values()], np.uint32)]),
            np.concatenate([self._kind[usable], np.array([kind[n] for _, n in added.values()], np.uint16)]),
        ]
        order = np.lexsort((columns[1], columns[0]))
        return _Index({"shards": shards, "names": names}, tuple(c[order] for c in columns))


def _halves(keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.frombuffer(bytes.fromhex("".join(keys)), ">u8").astype(np.uint64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


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
                write_durably(self._folder / f"{name}.safetensors", _sealed(self._pending))
        self._pending, self._bytes, self._since = {}, 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        # What is encoded stays, also when the user interrupts or a later sample fails; a full disk has nothing to add.
        if not isinstance(fault, DiffpipeError):
            self.flush()


def _sealed(tensors: dict[str, Tensor]) -> bytes:
    """A shard's bytes, with the hash of all that follows its header in the header."""
    content = safetensors.torch.save(tensors, {"format": FORMAT, "hash": BLANK})
    return content.replace(f'"hash":"{BLANK}"'.encode(), f'"hash":"{_hash(content)}"'.encode(), 1)


def _hash(content: bytes) -> str:
    begin = 8 + int.from_bytes(content[:8], "little")
    return blake2b(memoryview(content)[begin:], digest_size=16).hexdigest()


def _intact(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as shard:
            told = (shard.metadata() or {}).get("hash")
        return told == _hash(path.read_bytes())
    except (SafetensorError, OSError):
        return False


def _held(path: Path) -> dict[str, tuple[str, ...]]:
    """The entries of a shard, by key the names of their tensors."""
    with safe_open(path, "pt") as shard:
        if (shard.metadata() or {}).get("format") != FORMAT:
            return {}
        names: list[str] = list(shard.keys())
    held: dict[str, list[str]] = {}
    for name in names:
        key, _, tensor = name.partition(".")
        int(key, 16)
        held.setdefault(key, []).append(tensor)
    return {key: tuple(sorted(tensors)) for key, tensors in held.items()}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each shard by name."""
    try:
        return {e.name: e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".safetensors") and not e.name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        return {}  # who writes there finds out


def writing_to(folder: Path) -> AbstractContextManager[None]:
    """Tells of a disk that is full or cannot be written in the user's words."""
    return told_of_disk(
        "the cache cannot be written",
        where=str(folder),
        fix="free some space or set data.cache_dir to another disk, then run again; what was encoded so far stays",
    )


def _sweep(folder: Path) -> None:
    """Remove what processes that died while writing left, unless it is young enough to be another run's work."""
    for path in folder.glob(f"{UNFINISHED}*"):
        try:
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # another process removed it first
