"""The host: disks that runs and caches go to, memory, and the limits that the system sets."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from diffpipe.config.schema import Config
from diffpipe.doctor.finding import Finding
from diffpipe.metrics import GIB, amount

PIECE = 8 << 20  # bytes written at once
MOST = 256 << 20  # bytes written to a disk
LONG = 1.0  # seconds after which no more is written
SLOW = 50 << 20  # bytes a second
SMALL_DISK, FULL_DISK = 20 * GIB, GIB
SMALL_SHARED, NO_SHARED = GIB, 128 << 20
FEW_FILES, TOO_FEW_FILES = 1024, 256


def disk(name: str, folder: Path) -> Finding:
    """Whether a folder can be written, how fast it is and how much fits: a file is written to it and read.

    Args:
        folder: need not be there yet.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        return Finding(name, "fault", f"{place} is a file, where {folder} is to be a folder", "name another folder in the config")
    try:
        wrote, read = _speeds(place)
        free = shutil.disk_usage(place).free
    except OSError as fault:
        cure = "free some space, allow larger files, or name another folder in the config"
        return Finding(name, "fault", f"{folder} cannot be written: {fault.strerror or fault}", cure)
    told = f"{folder} writes {amount(wrote)}/s" + (f", reads {amount(read)}/s" if read else "") + f", {amount(free)} are free"
    if free < FULL_DISK:
        return Finding(name, "fault", told, "free some space, or name a folder on another disk in the config")
    if free < SMALL_DISK:
        return Finding(name, "warning", told, "checkpoints of large models are many GiB each: see checkpoint.keep, or name another disk")
    if wrote < SLOW:
        return Finding(name, "warning", told, "name a folder on a faster disk in the config, the cache's as data.cache_dir")
    return Finding(name, "ok", told)


def _speeds(folder: Path) -> tuple[float, float | None]:
    """Bytes a second that are written and read; what is read may come from memory where the system cannot be told to forget it."""
    file, block = folder / f".diffpipe-doctor-{uuid.uuid4().hex}", os.urandom(PIECE)
    try:
        begun, count = time.perf_counter(), 0
        with open(file, "wb") as out:
            while count < MOST and time.perf_counter() - begun < LONG:
                out.write(block)
                count += len(block)
            out.flush()
            os.fsync(out.fileno())
        wrote = count / (time.perf_counter() - begun)
        if sys.platform != "linux":  # no other lets go of what it keeps in memory
            return wrote, None
        with open(file, "rb", buffering=0) as back:
            os.posix_fadvise(back.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            while back.read(PIECE):
                pass
        return wrote, count / (time.perf_counter() - begun)
    finally:
        file.unlink(missing_ok=True)


def host_memory() -> Finding:
    """What programs may take of the host's memory."""
    memory = psutil.virtual_memory()
    told = f"{amount(memory.available)} of {amount(memory.total)} are free, {os.cpu_count()} processors"
    if memory.available < 4 * GIB:
        return Finding(
            "host memory", "warning", told, "end other programs; text encoders alone take several GiB while captions are encoded"
        )
    return Finding("host memory", "ok", told)


def limits(config: Config | None) -> Iterator[Finding]:
    """Shared memory, open files and locked memory, where the system has such limits."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _shared(shutil.disk_usage(shared).free, workers=config is None or config.data.workers > 0)
    if sys.platform == "win32":
        return
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 < files < FEW_FILES
    state = "fault" if 0 < files < TOO_FEW_FILES else "warning" if few else "ok"
    cure = "ulimit -n 65536 before the start; weights, cache shards and workers all hold files open"
    yield Finding("open files", state, f"at most {files}" if files >= 0 else "no limit", cure if few else "")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    told = (
        "no limit" if locked < 0 else f"at most {amount(locked)} for a process, which binds NCCL over InfiniBand; CUDA is tried by itself"
    )
    yield Finding("locked memory", "ok", told)


def _shared(free: int, workers: bool) -> Finding:
    told = f"{amount(free)} are free in /dev/shm, which loader workers hand batches over in"
    cure = "start the container with --ipc=host or --shm-size=16g; or set data.workers: 0"
    if free >= SMALL_SHARED or not workers:
        return Finding("shared memory", "ok", told)
    return Finding("shared memory", "fault" if free < NO_SHARED else "warning", told, cure)
