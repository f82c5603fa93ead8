"""Exports a run's trained weights, while it trains or from one of its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe import __version__
from diffpipe.config.schema import AdapterConfig, Config
from diffpipe.errors import DiffpipeError
from diffpipe.export.files import cast, write_json, write_safetensors
from diffpipe.export.names import original_names, rename, rename_lora
from diffpipe.models.base import DiffusionModel
from diffpipe.models.lora import lora_tensors
from diffpipe.models.weights import open_files
from diffpipe.pipeline.mesh import Mesh

WEIGHTS = "diffusion_pytorch_model"


def export_weights(
    config: Config, model: DiffusionModel, module: nn.Module, mesh: Mesh, folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Write what all stages have trained into ``folder``; every rank calls this, and gets the paths.

    Stages pass their weights through files, since the whole of them may fit no single rank.

    Raises:
        DiffpipeError: on every rank, when any stage's part or an export cannot be written.
    """
    parts = folder.with_name(f".{folder.name}-parts")
    files = [parts / f"stage-{stage}.safetensors" for stage in range(mesh.stages)]
    fault: DiffpipeError | None = None
    if mesh.replica == 0:
        # Whole weights are rounded here, once; adapters stay as they are until alpha is folded in.
        held = lora_tensors(module) if config.adapter is not None else cast(module.state_dict(), kinds(config, model))
        try:
            write_safetensors(files[mesh.stage], held, {})
        except DiffpipeError as failed:
            fault = failed
    try:
        if faults := [f for f in mesh.exchange(fault) if f is not None]:
            raise faults[0]
        # Just these files: a killed export on more stages may have left others.
        return mesh.decide(lambda: export_tensors(config, model, open_files(files), folder, formats))
    finally:
        mesh.barrier()
        if mesh.reporter:
            shutil.rmtree(parts, ignore_errors=True)


def export_tensors(
    config: Config, model: DiffusionModel, tensors: Mapping[str, Tensor], folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Write trained weights into ``folder`` in each format.

    Args:
        tensors: adapters by ``<layer>.lora_A.weight``, or full weights by diffusers name; what a full fine-tune
            left frozen may be missing and is taken from the base.

    Raises:
        DiffpipeError: when a file cannot be written.
    """
    shapes = {name: tuple(p.shape) for name, p in model.load_denoiser().state_dict().items()}
    if config.adapter is not None:
        return [_lora(config, model, tensors, shapes, folder, kind) for kind in formats]
    base = model.weights().tensors
    whole = cast({name: tensors[name] if name in tensors else base[name] for name in shapes}, kinds(config, model))
    paths: list[Path] = []
    for kind in formats:
        if kind == "comfyui":
            named = rename(whole, original_names(model.denoiser, shapes))
            paths.append(write_safetensors(folder / f"{model.name}-comfyui.safetensors", named, metadata(config, kind)))
        else:
            paths.append(write_folder(folder / "transformer", whole, model, metadata(config, kind)))
    return paths


def _lora(
    config: Config, model: DiffusionModel, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path, kind: str
) -> Path:
    assert config.adapter is not None
    named = fold_alpha(tensors, config.adapter)
    if kind == "comfyui":
        named = rename_lora(named, original_names(model.denoiser, shapes), {n: s[0] for n, s in shapes.items() if s})
    prefix = "diffusion_model" if kind == "comfyui" else "transformer"
    named = cast({f"{prefix}.{n}": t for n, t in named.items()}, lambda _: _dtype(config))
    return write_safetensors(folder / f"{model.name}-lora-{kind}.safetensors", named, metadata(config, kind))


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.export.dtype or config.model.dtype)


def kinds(config: Config, model: DiffusionModel) -> Callable[[str], torch.dtype]:
    """What type a whole weight is exported in: the config's, or float32 where the diffusers class keeps that on loading."""
    insists = set(model.denoiser_class()._keep_in_fp32_modules or [])
    return lambda name: torch.float32 if insists & set(name.split(".")) else _dtype(config)


def fold_alpha(tensors: Mapping[str, Tensor], adapter: AdapterConfig) -> dict[str, Tensor]:
    """Adapters whose B is multiplied by alpha / rank: readers that know no alpha take it to be the rank."""
    scale = (adapter.alpha or adapter.rank) / adapter.rank
    return {n: t * scale if scale != 1 and n.endswith(".lora_B.weight") else t for n, t in tensors.items()}


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], model: DiffusionModel, about: Mapping[str, str], limit: int = 10 << 30
) -> Path:
    """A diffusers component folder: config.json and weights in files of at most about ``limit`` bytes.

    Raises:
        DiffpipeError: when it cannot be written; an earlier one of that name stays.
    """
    aside, earlier = folder.with_name(f".{folder.name}-unfinished"), folder.with_name(f".{folder.name}-earlier")
    shutil.rmtree(aside, ignore_errors=True)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.dtype.itemsize
        if groups[-1] and size + bytes_ > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += bytes_
    weight_map: dict[str, str] = {}
    try:
        for i, group in enumerate(groups):
            place = f"-{i + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            name = f"{WEIGHTS}{place}.safetensors"
            write_safetensors(aside / name, group, about)
            weight_map |= dict.fromkeys(group, name)
        if len(groups) > 1:
            total = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
            write_json(aside / f"{WEIGHTS}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(aside / "config.json", {**model.denoiser_config, "_class_name": model.denoiser})
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            os.replace(folder, earlier)
        os.replace(aside, folder)
    except OSError as fault:
        fix = "close what has files of it open, or export elsewhere"
        raise DiffpipeError(f"cannot be replaced: {fault}", where=str(folder), fix=fix) from fault
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)
    return folder


def metadata(config: Config, kind: str) -> dict[str, str]:
    """What the header of an exported file says about where it comes from."""
    about: dict[str, Any] = {
        "diffpipe.version": __version__,
        "diffpipe.format": kind,
        "diffpipe.family": config.model.family,
        "diffpipe.base": str(config.model.transformer or config.model.path),
        "diffpipe.config_hash": config_hash(config),
    }
    if config.adapter is not None:
        # alpha / rank is inside lora_B, so for a reader alpha is the rank.
        about |= {"diffpipe.rank": config.adapter.rank, "diffpipe.alpha": config.adapter.alpha or config.adapter.rank}
    return {k: str(v) for k, v in about.items()}


def config_hash(config: Config) -> str:
    return hashlib.blake2b(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode(), digest_size=8).hexdigest()


def check_formats(model: DiffusionModel, formats: Sequence[str]) -> None:
    """Find out before training, not after it, that a format cannot be written.

    Raises:
        DiffpipeError: when a parameter has no original name.
    """
    if "comfyui" in formats:
        original_names(model.denoiser, model.load_denoiser().state_dict())
