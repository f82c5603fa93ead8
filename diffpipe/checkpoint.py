"""What a run needs to go on: trained weights, optimizer, random states and the place in the data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from diffpipe.errors import CheckpointError
from diffpipe.optim.state import restore_state, state_of
from diffpipe.pipeline.mesh import Mesh

STATE = "state.json"  # written last: a folder without it is no checkpoint
UNFINISHED = ".unfinished-"


def save(folder: Path, step: int, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], mesh: Mesh, keep: int) -> Path:
    """Write ``folder/step-N`` from all ranks, beside its final name and then renamed; keep the newest ``keep``.

    Args:
        folder: the run's ``checkpoints``.
        module: this rank's part; its trained parameters are saved under their global names.
        state: what else the run needs, as JSON.

    Raises:
        CheckpointError: when it cannot be written; older checkpoints stay.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f"{UNFINISHED}{final.name}"
    if mesh.reporter:
        for old in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(old)
        aside.mkdir(parents=True, exist_ok=True)
    mesh.barrier()
    tensors: dict[str, Any] = {f"model.{n}": p.detach() for n, p in module.named_parameters() if p.requires_grad}
    tensors |= {f"optimizer.{k}": t for k, t in state_of(optimizer).items()}
    tensors |= _random_states(mesh)
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(aside))
    except (CheckpointException, OSError) as fault:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written, {shutil.disk_usage(folder).free >> 20} MiB free: {_first_line(fault)}",
            where=str(folder),
            fix="free some space or set output_dir to another disk, then train with --resume; older checkpoints are intact",
        ) from fault
    if mesh.reporter:
        write_durably(aside / STATE, json.dumps({"step": step, **state}, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    mesh.barrier()
    return final


def load(path: Path, module: nn.Module, optimizer: Optimizer, mesh: Mesh, on_host: Collection[nn.Parameter] = ()) -> dict[str, Any]:
    """Fill the part and its optimizer from a checkpoint, whatever mesh wrote it; returns its ``state``.

    Args:
        on_host: parameters whose optimizer state stays in host memory.

    Raises:
        CheckpointError: when the checkpoint does not hold what this part trains.
    """
    reader = FileSystemReader(path)
    held = _held(reader, path)
    trained = {f"model.{n}": p.detach() for n, p in module.named_parameters() if p.requires_grad}
    for key, tensor in trained.items():
        if key not in held or held[key].size != tensor.shape:
            found = f"has it as {tuple(held[key].size)}" if key in held else "does not have it"
            raise CheckpointError(
                f"the config trains {key.removeprefix('model.')} {tuple(tensor.shape)}, the checkpoint {found}",
                where=str(path),
                fix="resume with the model and adapter sections that the run started with (config.yaml in the run folder)",
            )
    names = {key.removeprefix("model.") for key in trained}
    state = {k: _empty(m) for k, m in held.items() if k.startswith("optimizer.") and k.removeprefix("optimizer.").split("//")[0] in names}
    random = {k: _empty(held[k]) for k in _random_states(mesh) if k in held}
    dcp.load({**trained, **state, **random}, storage_reader=reader)
    restore_state(optimizer, {k.removeprefix("optimizer."): t for k, t in state.items()}, on_host)
    _restore_random(random, mesh)
    return read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint by parameter name, on the CPU, without any process group."""
    reader = FileSystemReader(path)
    weights = {k: _empty(m) for k, m in _held(reader, path).items() if k.startswith("model.")}
    dcp.load(dict(weights), storage_reader=reader, no_dist=True)
    return {k.removeprefix("model."): t for k, t in weights.items()}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{STATE}"))


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it holds either its old content or all of the new."""
    aside = path.with_name(f"{UNFINISHED}{path.name}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _held(reader: FileSystemReader, path: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, CheckpointException) as fault:
        raise CheckpointError(
            f"not a readable checkpoint: {_first_line(fault)}", where=str(path), fix="resume from an older one"
        ) from fault
    return {k: m for k, m in metadata.items() if isinstance(m, TensorStorageMetadata)}


def _empty(metadata: TensorStorageMetadata) -> Tensor:
    return torch.empty(metadata.size, dtype=metadata.properties.dtype)


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


def _first_line(fault: BaseException) -> str:
    lines = [line for line in str(fault).splitlines() if line.strip()]
    return lines[-1].strip() if isinstance(fault, CheckpointException) and lines else (lines[0] if lines else type(fault).__name__)
