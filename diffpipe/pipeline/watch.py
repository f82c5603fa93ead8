"""Ends every rank of a run, and says which is at fault, when one dies or gets on no more."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from diffpipe.errors import DiffpipeError
from diffpipe.pipeline.mesh import Mesh, wait_for

TORCH = str(Path(torch.__file__).parent)
WAITING = os.path.join(TORCH, "distributed")
# What torch's backends say when a connection is lost; they have no error of their own for it.
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


class Watch:
    """Watches the ranks from when it is entered until it is left, from a thread of its own on each.

    Once a second each rank puts a sign of life into the store: how often ``tick`` was called, and where its main thread is. A rank that
    gives none for ``timeout`` seconds is gone. When all that do give them have stood still for as long, the run hangs: at fault are
    those that stand outside of torch's communication, or else those with the fewest ticks. So a step may compile, or wait for a slow
    disk, as long as something moves.

    Args:
        timeout: seconds.
        tell: shows a person a fault of which no exception can tell, since the main thread may wait for ever and the process is ended.
        every: seconds between signs of life.
    """

    def __init__(self, mesh: Mesh, timeout: float, tell: Callable[[DiffpipeError], None], every: float = 1.0) -> None:
        self.mesh, self.timeout, self.tell, self.every = mesh, timeout, tell, every
        self.ticks = 0
        self.patience = 0
        self._main = threading.get_ident()
        self._signs = 0
        self._stood: tuple[Any, float] = (None, monotonic())  # where the main thread stands, and since when
        self._heard: dict[int, tuple[int, float]] = {}  # the number of each rank's last sign, and when it was new
        self._end: str | None = None
        self._lost = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.mesh.world > 1:
            self._store = self.mesh.store.clone()  # pyright: ignore[reportAttributeAccessIssue] - a connection of its own: the main thread may wait in the other
            self._sign()
            self.mesh.barrier()
            self._thread.start()
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        if self.mesh.world == 1:
            return
        at_fault = ""
        if isinstance(fault, RuntimeError) and any(word in str(fault) for word in LOST):
            self._lost = True
            at_fault = self._who_is_gone()
        self._left.set()
        self._thread.join()
        self._end = "" if fault is None else f"{fault}".splitlines()[0] if str(fault) else type(fault).__name__
        with self._store_may_be_gone():
            self._sign()
        if at_fault:
            raise self._gone(at_fault) from fault

    def tick(self) -> None:
        """Something was finished, such as a step."""
        self.ticks += 1

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around what may take long on one rank while others wait for it, such as writing an export."""
        self.patience += 1
        try:
            yield
        finally:
            self.patience -= 1

    def _run(self) -> None:
        following = (self.mesh.rank + 1) % self.mesh.world
        while not self._left.wait(self.every):
            try:
                self._sign()
                if self._store.check(["fault"]):
                    self._end_all(self._store.get("fault").decode())
                if self._silent(following) > self.timeout:
                    self._end_all(self._name(following, self._read(following)))
                if monotonic() - self._stood[1] > self.timeout:
                    self._look_around()
            except dist.DistError as fault:
                if not self._left.is_set():
                    self._end_all(f"the store of this run, on rank 0's machine, is gone: {str(fault).splitlines()[0]}", publish=False)

    def _sign(self) -> None:
        frame = sys._current_frames().get(self._main)
        stands = (self.ticks, frame.f_code, frame.f_lasti) if frame is not None else None
        if stands != self._stood[0] or self.patience:
            self._stood = stands, monotonic()
        self._signs += 1
        sign = {
            "number": self._signs,
            "ticks": self.ticks,
            "still": monotonic() - self._stood[1],
            "place": _place(frame),
            "waits": frame is not None and (frame.f_code is wait_for.__code__ or frame.f_code.co_filename.startswith(WAITING)),
            "process": f"{socket.gethostname()}, process {os.getpid()}",
            "end": self._end,
            "lost": self._lost,
        }
        self._store.set(f"sign/{self.mesh.rank}", json.dumps(sign))

    def _read(self, rank: int) -> dict[str, Any]:
        sign = json.loads(self._store.get(f"sign/{rank}"))
        if self._heard.get(rank, (0, 0.0))[0] != sign["number"]:
            self._heard[rank] = sign["number"], monotonic()
        return sign

    def _silent(self, rank: int) -> float:
        """Seconds since a rank's last sign was new; 0 when it has left."""
        sign = self._read(rank)
        return 0.0 if sign["end"] is not None else monotonic() - self._heard[rank][1]

    def _look_around(self) -> None:
        """This rank stands still: end all if every other does."""
        signs = {rank: self._read(rank) for rank in range(self.mesh.world)}
        if any(sign["still"] <= self.timeout and sign["end"] is None for sign in signs.values()):
            return
        standing = {rank: sign for rank, sign in signs.items() if sign["end"] is None}
        fewest = min(sign["ticks"] for sign in standing.values())
        blamed = [r for r, s in standing.items() if not s["waits"]] or [r for r, s in standing.items() if s["ticks"] == fewest]
        others = [self._name(r, s) for r, s in standing.items() if r not in blamed][:4]
        self._end_all("; ".join(self._name(r, signs[r]) for r in blamed) + "".join(f"\n  while {other}" for other in others))

    def _who_is_gone(self) -> str:
        """The ranks that ended by themselves or give no more signs, as far as that shows soon after a connection was lost."""
        with self._store_may_be_gone():
            for _ in range(6):
                signs = {rank: self._read(rank) for rank in range(self.mesh.world) if rank != self.mesh.rank}
                ended = [self._name(r, s) for r, s in signs.items() if s["end"] and not s["lost"]]
                silent = [self._name(r, s) for r, s in signs.items() if self._silent(r) > 3 * self.every]
                if ended or silent:
                    return "; ".join(ended or silent)
                sleep(self.every)
        return ""

    def _name(self, rank: int, sign: dict[str, Any]) -> str:
        name = f"rank {rank} ({sign['process']})"
        if sign["end"] is not None:
            return f"{name} ended: {sign['end']}"
        silent = monotonic() - self._heard[rank][1]
        if silent > 3 * self.every:
            return f"{name} has given no sign of life for {silent:.0f} s; it was at {sign['place']} after {sign['ticks']} steps"
        doing = "waits for others" if sign["waits"] else "stands still"
        return f"{name} {doing} since {sign['still']:.0f} s after {sign['ticks']} steps, at {sign['place']}"

    def _gone(self, found: str) -> DiffpipeError:
        return DiffpipeError(
            found,
            where="mesh.timeout",
            expected=f"every rank to get on within {self.timeout:g} s",
            fix="see what that rank says and what its machine does, then train with --resume; raise mesh.timeout if it was only slow",
        )

    def _end_all(self, found: str, publish: bool = True) -> NoReturn:
        if publish and not self._store.check(["fault"]):
            self._store.set("fault", found)
        self.tell(self._gone(found))
        sleep(2 * self.every if publish else 0.0)  # for the others to read it, should the store end with this process
        os._exit(1)

    @contextmanager
    def _store_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError:
            return


def _place(frame: FrameType | None) -> str:
    """The innermost line of a stack that is not torch's."""
    inner = frame
    while inner is not None and inner.f_code.co_filename.startswith((TORCH, "<")):
        inner = inner.f_back
    inner = inner or frame
    if inner is None:
        return "its end"
    path = Path(inner.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{inner.f_lineno} in {inner.f_code.co_name}"
