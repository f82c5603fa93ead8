"""How worker processes of loaders start, and what is said when one ends."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

from diffpipe.errors import DiffpipeError, causes

# A terminal's Ctrl-C, a system that shuts down, a connection that is lost, and what schedulers send ahead of taking a machine away;
# Windows lacks the last two.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def worker_context() -> Any:
    """A way that never copies a process which may hold a CUDA context, decoder threads or NCCL's."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch is imported once, in the server the workers come from.
    context.set_forkserver_preload(["diffpipe.data.loader"])
    if threading.current_thread() is threading.main_thread():
        # The server inherits what is ignored: a signal to all processes of a job must not end what the run still needs for its step.
        before = {each: signal.signal(each, signal.SIG_IGN) for each in SIGNALS}
        forkserver.ensure_running()
        for each, handler in before.items():
            signal.signal(each, handler)
    return context


def outlive_signals(worker: int) -> None:
    """Called in a loader's worker: what a signal means is for the training process to say, which ends its workers when it ends."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def told_of_death(key: str) -> Iterator[None]:
    """Turns what torch and multiprocessing raise when a worker was killed into a DiffpipeError.

    Args:
        key: of the config, that says how many workers there are.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as fault:
        if (death := _death_in(fault)) is None:
            raise
        raise DiffpipeError(
            f"a worker process was ended from outside: {(str(death) or type(death).__name__).splitlines()[0]}",
            where=key,
            expected="enough memory for each worker; the system ends one when it runs out",
            fix=f"lower {key}, then run again; nothing that was finished is lost",
        ) from fault


def _death_in(fault: BaseException) -> BaseException | None:
    """What tells of a worker's end: torch raises it wherever the process is just then, so that others may have wrapped it."""
    told = next((c for c in causes(fault) if "DataLoader worker" in str(c)), None)
    return told or (None if isinstance(fault, RuntimeError) else fault)
