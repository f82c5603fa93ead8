"""What a run needs to go on: trained weights, optimizer, random states and the place in the data.

A checkpoint is a folder: a safetensors file of every rank that held something, each tensor under the name of its parameter, and
``state.json`` with the size and hash of each file. Which rank wrote a tensor is of no meaning when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from diffpipe.config.schema import CheckpointConfig
from diffpipe.durable import UNFINISHED, write_durably
from diffpipe.errors import CheckpointError, DiffpipeError, told_of_disk
from diffpipe.export.files import write_safetensors
from diffpipe.models.weights import open_files, realise
from diffpipe.optim.state import by_element, restore_state, state_of
from diffpipe.pipeline.memory.ferry import Ferry
from diffpipe.pipeline.memory.host import HostMemory
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.shard import joined, local, piece_name, shard_of

STATE = "state.json"  # written last: a folder without it is no checkpoint
DAMAGED = "damaged-"
ROOM = "free some space or set output_dir to another disk, then train with --resume; older checkpoints are intact"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        stalled: seconds that training stood still for it on this rank.
    """

    path: Path
    stalled: float


@dataclass(frozen=True)
class HeldOut:
    """The held-out loss behind a step.

    Attributes:
        loss: the mean of all sets.
        measure: not the same where losses cannot be compared, since they are of other samples, noise or times.
    """

    step: int
    loss: float
    measure: str


@dataclass
class _Writing:
    """A checkpoint under way: what this rank's thread will have written, by file name, as ``state.json`` lists it."""

    step: int
    state: Mapping[str, Any]
    files: Future[dict[str, Any]]
    stalled: float


class Checkpoints:
    """Writes a run's checkpoints, each in a thread while training goes on, one at a time.

    Args:
        folder: the run's ``checkpoints``.
        pinned: page-lock the host memory that tensors are copied into.
    """

    def __init__(self, folder: Path, mesh: Mesh, config: CheckpointConfig, pinned: bool) -> None:
        self.folder, self.mesh, self.config = folder, mesh, config
        self._ferry = Ferry(mesh.device, HostMemory(pinned), torch.get_device_module(mesh.device))
        self._hosts: dict[str, Tensor] = {}  # where tensors are copied, from one checkpoint to the next
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None

    def save(self, step: int, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Begin to write ``step-N``; every rank calls this. The one before must be finished, and so must this one before anything is
        trained on where it is not written in the background.

        Args:
            module: this rank's part; its trained parameters are saved under their global names.
            state: what else the run needs, as JSON.

        Raises:
            CheckpointError: when the folder cannot be made.
        """
        begun = perf_counter()
        assert self._writing is None, "one is written at a time"
        self.mesh.decide(lambda: self._make_room(step))
        tensors = _random_states(self.mesh)
        if self.mesh.replica < self.mesh.shards:  # the others hold the same
            tensors |= _held(module, optimizer, self.mesh)
        if self.config.background:
            tensors = self._copied(tensors)
        file = self._aside(step) / f"rank-{self.mesh.rank:05d}.safetensors"
        self._writing = _Writing(step, state, self._thread.submit(_write, file, tensors), perf_counter() - begun)

    def amend(self, path: Path, more: Mapping[str, Any]) -> None:
        """Replace parts of the state of a complete checkpoint; every rank calls this.

        Raises:
            CheckpointError: on every rank, when it cannot be written.
        """

        def write() -> None:
            with told_of_disk(f"what was found behind {path.name} could not be written", str(path), ROOM, CheckpointError):
                _write_state(path, {**read_state(path), **more})

        self.mesh.decide(write)

    def is_writing(self) -> bool:
        """Whether this rank is not through with its part of a checkpoint."""
        return self._writing is not None and not self._writing.files.done()

    def finish(self) -> Saved | None:
        """Give the checkpoint under way its name once all ranks have written theirs, and remove what is too old; every rank calls this.

        Raises:
            CheckpointError: on every rank, when any could not write; older checkpoints stay.
        """
        if (writing := self._writing) is None:
            return None
        self._writing = None
        fault = writing.files.exception()  # waits
        if fault is not None and not isinstance(fault, DiffpipeError):
            raise fault
        found = self.mesh.exchange(fault or writing.files.result())
        faults = [each for each in found if isinstance(each, DiffpipeError)]
        if faults:
            free = shutil.disk_usage(self.folder).free >> 20
            raise CheckpointError(
                f"the checkpoint of step {writing.step} could not be written, {free} MiB free: {faults[0].found}",
                where=str(self.folder),
                fix=ROOM,
            )
        files = {name: about for each in found for name, about in each.items()}
        return Saved(self.mesh.decide(lambda: self._name(writing, files)), writing.stalled)

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hosts = self._hosts
        for name, tensor in tensors.items():
            if name not in hosts or (hosts[name].shape, hosts[name].dtype) != (tensor.shape, tensor.dtype):
                hosts[name] = self._ferry.host_like(tensor)
        self._ferry.send(list(tensors.values()), [hosts[name] for name in tensors])
        self._ferry.settle()
        return {name: hosts[name] for name in tensors}

    def _aside(self, step: int) -> Path:
        return self.folder / f"{UNFINISHED}step-{step:08d}"

    def _make_room(self, step: int) -> None:
        with told_of_disk(f"no checkpoint of step {step} can be written", str(self.folder), ROOM, CheckpointError):
            for old in self.folder.glob("*step-*"):
                if old.name.startswith(UNFINISHED) or not (old / STATE).is_file():  # what a kill left of a writing, or of a removal
                    shutil.rmtree(old)
            self._aside(step).mkdir(parents=True)

    def _name(self, writing: _Writing, files: Mapping[str, Any]) -> Path:
        aside, final = self._aside(writing.step), self.folder / f"step-{writing.step:08d}"
        with told_of_disk(f"the checkpoint of step {writing.step} could not be completed", str(self.folder), ROOM, CheckpointError):
            if missing := [name for name in files if not (aside / name).is_file()]:
                raise CheckpointError(
                    f"{missing[0]} of the checkpoint of step {writing.step} cannot be seen here",
                    where=str(self.folder),
                    expected="a folder that all machines of the run share",
                    fix="set output_dir to one",
                )
            _write_state(aside, {"step": writing.step, "files": files, **writing.state})
            _sync(aside)
            os.replace(aside, final)
            _sync(self.folder)
            best = best_checkpoint(self.folder) if self.config.keep_best else None
            for old in list_checkpoints(self.folder)[: -self.config.keep]:
                if best is not None and old == best[0]:
                    continue
                (old / STATE).unlink()  # first, so that no kill leaves half of one that looks whole
                shutil.rmtree(old)
        return final


def load(
    path: Path, module: nn.Module, optimizer: Optimizer, rule: str, mesh: Mesh, on_host: Collection[nn.Parameter] = ()
) -> dict[str, Any]:
    """Fill the part and its optimizer from a checkpoint, whatever mesh wrote it; returns its ``state``.

    Args:
        rule: the optimizer's; the state of one that has another is of no use to it.
        on_host: parameters whose optimizer state stays in host memory.

    Raises:
        CheckpointError: when the checkpoint does not hold what this part trains.
    """
    state = read_state(path)
    files = open_files([path / name for name in state["files"]])
    held = joined(files)
    trained = _fill(module, held, path)
    if state.get("rule", rule) == rule:
        own: dict[str, Tensor] = {}
        for key, tensor in held.items():
            section, _, name = key.partition(".")
            parameter = trained.get(f"model.{name.partition('//')[0]}") if section == "optimizer" else None
            if parameter is not None:
                piece = files.get(piece_name(key, mesh.shard, mesh.shards))
                own[name] = realise(piece) if piece is not None else _share(name, realise(tensor), parameter, path)
        restore_state(optimizer, own, on_host)
    _restore_random({k: realise(held[k]) for k in _random_states(mesh) if k in held}, mesh)
    return state


def load_weights(path: Path, module: nn.Module) -> None:
    """Fill what the part trains from a checkpoint, whatever mesh wrote it.

    Raises:
        CheckpointError: when the checkpoint does not hold it.
    """
    _fill(module, joined(open_files([path / name for name in read_state(path)["files"]])), path)


def _fill(module: nn.Module, held: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Put weights of a checkpoint into the parameters that train; gives those by the names they have there."""
    trained = {f"model.{n}": p.detach() for n, p in module.named_parameters() if p.requires_grad}
    for key, tensor in trained.items():
        if key not in held or held[key].shape != tensor.shape:
            found = f"has it as {tuple(held[key].shape)}" if key in held else "does not have it"
            raise CheckpointError(
                f"the config trains {key.removeprefix('model.')} {tuple(tensor.shape)}, the checkpoint {found}",
                where=str(path),
                fix="resume with the model and adapter sections that the run started with (config.yaml in the run folder)",
            )
        tensor.copy_(shard_of(realise(held[key]), tensor, tensor.device))
    return trained


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint by parameter name, on the CPU, without any process group.

    Raises:
        CheckpointError: when a file of it is not what was written.
    """
    if found := damage(path):
        raise CheckpointError(f"is damaged: {found}", where=str(path), fix="take an older checkpoint")
    held = joined(open_files([path / name for name in read_state(path)["files"]]))
    return {k.removeprefix("model."): realise(t) for k, t in held.items() if k.startswith("model.")}


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    write_durably(path / STATE, json.dumps(state, indent=1).encode())


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{STATE}"))


def best_checkpoint(folder: Path, measure: str | None = None) -> tuple[Path, HeldOut] | None:
    """The complete checkpoint with the lowest held-out loss, of equal ones the oldest; None where none has one.

    Args:
        measure: of the losses that are compared; None takes that of the newest.
    """
    found = [(path, held_out) for path in list_checkpoints(folder) if (held_out := _held_out(path)) is not None]
    measure = measure or next((h.measure for _, h in reversed(found)), None)
    return min((f for f in found if f[1].measure == measure), key=lambda f: f[1].loss, default=None)


def damage(path: Path, mesh: Mesh | None = None) -> str:
    """What shows that a checkpoint's files are not those that were written; nothing where they are.

    Args:
        mesh: whose ranks share the reading, where all of them call this.
    """
    rank, world = (0, 1) if mesh is None else (mesh.rank, mesh.world)
    try:
        files = read_state(path)["files"].items()
    except (OSError, ValueError, KeyError, TypeError):
        own = f"{STATE} cannot be read"
    else:
        own = "; ".join(filter(None, (_damage(path / name, **about) for name, about in sorted(files)[rank::world])))
    return own if mesh is None else next(filter(None, mesh.exchange(own)), "")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither taken for a good one nor lost."""
    aside = path.with_name(f"{DAMAGED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def _held_out(path: Path) -> HeldOut | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # of one that is damaged, or that no evaluation came before
        held_out = HeldOut(**read_state(path)["held_out"])
        return held_out if math.isfinite(held_out.loss) else None


def _held(module: nn.Module, optimizer: Optimizer, mesh: Mesh) -> dict[str, Tensor]:
    """What this rank writes of weights and optimizer state: its shards, and the first of those that share weights what is whole."""
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    whole = {f"model.{n}": p for n, p in trained.items() if not isinstance(p, DTensor)}
    pieces = {f"model.{n}": local(p) for n, p in trained.items() if isinstance(p, DTensor)}
    for key, tensor in state_of(optimizer).items():
        place = pieces if isinstance(trained[key.partition("//")[0]], DTensor) and by_element(key, tensor) else whole
        place[f"optimizer.{key}"] = tensor
    named = {piece_name(n, mesh.shard, mesh.shards): t for n, t in pieces.items()}
    return named | (whole if mesh.shard == 0 else {})


def _share(name: str, state: Tensor, parameter: Tensor, path: Path) -> Tensor:
    """This rank's shard of a parameter's optimizer state, from a checkpoint of another number of shards."""
    if not by_element(name, state):
        return state
    if state.shape != parameter.shape:
        raise CheckpointError(
            f"the optimizer state {name} is {tuple(state.shape)} for weights that are {tuple(parameter.shape)}",
            where=str(path),
            expected="state with a value for each weight, where mesh.shard is not what the checkpoint was written with",
            fix="resume with the mesh.shard of the config.yaml in the run folder",
        )
    return local(shard_of(state, parameter, state.device))


def _write(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    write_safetensors(file, tensors, {})
    return {file.name: {"size": file.stat().st_size, "hash": _hash(file)}}


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _damage(file: Path, size: int, hash: str) -> str:
    try:
        if (found := file.stat().st_size) != size:
            return f"{file.name} has {found} bytes of {size}"
        return "" if _hash(file) == hash else f"{file.name} has other bytes than were written"
    except OSError as fault:
        return f"{file.name}: {fault.strerror or fault}"


def _sync(folder: Path) -> None:
    """Have a folder's names on disk, where the system can; Windows writes them itself."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _random_states(mesh: Mesh) -> dict[str, Tensor]:
    """This rank's generator states; the rank is in the key, since equal keys of two ranks would become one."""
    states = {f"random.{mesh.rank}.cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states[f"random.{mesh.rank}.cuda"] = torch.cuda.get_rng_state(mesh.device)
    return states


def _restore_random(states: Mapping[str, Tensor], mesh: Mesh) -> None:
    for key, state in states.items():
        if key.endswith(".cuda"):
            torch.cuda.set_rng_state(state, mesh.device)
        else:
            torch.set_rng_state(state)
