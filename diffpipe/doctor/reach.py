"""Whether processes reach each other as those of a run must: two real ones meet and add up."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from diffpipe.doctor.finding import Finding

COUNT = 4 << 20  # float32 numbers that are added up
PATIENCE = 60  # seconds for two processes to start, meet and answer
TORCHRUN = 29500  # where torchrun has its processes meet unless it is told otherwise


def meetings() -> Iterator[Finding]:
    """gloo between two processes, NCCL between two GPUs or on one, and the port where torchrun meets."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("gloo", "fault", "torch is built without torch.distributed", "install a build of torch that has it")
        return
    yield meet("gloo", 2)
    if torch.cuda.is_available() and dist.is_nccl_available():
        yield meet("nccl", min(2, torch.cuda.device_count()))
    yield torchrun_port()


def meet(backend: str, processes: int) -> Finding:
    """Have processes meet on this machine and add up 16 MiB."""
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    started = [context.Process(target=add_up, args=(rank, processes, port, backend, answers), daemon=True) for rank in range(processes)]
    for process in started:
        process.start()
    end, told = time.monotonic() + PATIENCE, []
    try:
        while len(told) < processes and time.monotonic() < end:
            try:
                told.append(answers.get(timeout=0.5))
            except queue.Empty:
                if not any(process.is_alive() for process in started):
                    break
            if told and isinstance(told[-1], str):
                break
    finally:
        for process in started:
            process.join(1)
            process.kill()  # one that waits for the other in vain
    faults = [answer for answer in told if isinstance(answer, str)]
    if faults or len(told) < processes:
        said = faults[0] if faults else f"{processes - len(told)} of {processes} processes gave no answer in {PATIENCE} s"
        return Finding(backend, "fault", f"{processes} processes of this machine do not reach each other: {said}", _cure(backend))
    of = "2 processes" if processes == 2 else "1 process, for there is 1 GPU"
    return Finding(backend, "ok", f"{of} added up 16 MiB in {1000 * max(told):.0f} ms")


def _cure(backend: str) -> str:
    if backend == "nccl":
        return "NCCL_DEBUG=INFO tells more; try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1, and check NCCL_SOCKET_IFNAME"
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named:
        return f"GLOO_SOCKET_IFNAME is {named}: name an interface that is there, or unset it"
    return "give this machine's name an address of its own in /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface such as lo"


def add_up(rank: int, processes: int, port: int, backend: str, answers: Any) -> None:
    """One of the processes; answers with seconds, or with what went wrong."""
    if sys.platform == "win32":
        os.environ["USE_LIBUV"] = "0"  # torch's builds for Windows have none
    try:
        import torch
        import torch.distributed as dist

        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore("127.0.0.1", port, processes, rank == 0, timeout=timedelta(seconds=PATIENCE / 2))
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=PATIENCE / 2))
        for _ in range(2):  # the first time connects
            numbers = torch.full((COUNT,), float(rank + 1), device=device)
            begun = time.perf_counter()
            dist.all_reduce(numbers)
            total = numbers[-1].item()
            took = time.perf_counter() - begun
        dist.barrier()
        dist.destroy_process_group()
        right = processes * (processes + 1) / 2
        answers.put(took if total == right else f"{total} came out instead of {right}")
    except Exception as fault:  # told to the person, whatever it is
        answers.put(f"{type(fault).__name__}: {(str(fault) or 'no more is said').splitlines()[0]}")


def torchrun_port() -> Finding:
    """Whether the port is free where torchrun's processes meet."""
    named = os.environ.get("MASTER_PORT", str(TORCHRUN))
    if not named.isdecimal() or not 0 < int(named) < 1 << 16:
        return Finding("torchrun's port", "fault", f"MASTER_PORT is {named!r}", "unset it, or name a port from 1024 to 65535")
    port = int(named)
    with socket.socket() as trial:
        if os.name != "nt":
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            trial.bind(("", port))
        except OSError as fault:
            cure = "start with torchrun --master_port=29501, or another free one; another run may hold this one"
            return Finding("torchrun's port", "warning", f"{port} is taken: {fault.strerror or fault}", cure)
    return Finding("torchrun's port", "ok", f"{port} is free")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
