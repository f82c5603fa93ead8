"""Exports a run's trained weights, while it trains or from one of its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe import __version__
from diffpipe.config.schema import AdapterConfig, Config
from diffpipe.export.files import write_safetensors
from diffpipe.export.names import original_names, rename, rename_lora
from diffpipe.models.base import DiffusionModel
from diffpipe.models.lora import lora_tensors
from diffpipe.models.weights import Lazy, open_files
from diffpipe.pipeline.mesh import Mesh


def export_weights(config: Config, model: DiffusionModel, module: nn.Module, mesh: Mesh, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write what all stages have trained into ``folder``; every rank calls this, the reporter gets the paths.

    Stages pass their weights through files, since the whole of them may fit no single rank.
    """
    parts = folder.with_name(f".{folder.name}-parts")
    if mesh.replica == 0:
        held = lora_tensors(module) if config.adapter is not None else module.state_dict()
        write_safetensors(parts / f"stage-{mesh.stage}.safetensors", held, {})
    mesh.barrier()
    try:
        paths = mesh.decide(lambda: export_tensors(config, model, open_files(sorted(parts.glob("stage-*.safetensors"))), folder, formats))
    finally:
        mesh.barrier()
        if mesh.reporter:
            shutil.rmtree(parts, ignore_errors=True)
    return paths


def export_tensors(config: Config, model: DiffusionModel, tensors: Mapping[str, Lazy], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write trained weights into ``folder`` in each format.

    Args:
        tensors: adapters by ``<layer>.lora_A.weight``, or full weights by diffusers name; what a full fine-tune
            left frozen may be missing and is taken from the base.
    """
    dtype = getattr(torch, config.export.dtype or config.model.dtype)
    about = metadata(config)
    shapes = {name: tuple(p.shape) for name, p in model.load_denoiser().state_dict().items()}
    paths: list[Path] = []
    if config.adapter is not None:
        scaled = fold_alpha(tensors, config.adapter)
        for kind in formats:
            if kind == "comfyui":
                named = rename_lora(scaled, original_names(model.denoiser, shapes), {n: s[0] for n, s in shapes.items() if s})
                named = {f"diffusion_model.{n}": t for n, t in named.items()}
            else:
                named = {f"transformer.{n}": t for n, t in scaled.items()}
            paths.append(write_safetensors(folder / f"{model.name}-lora-{kind}.safetensors", named, about, dtype))
        return paths
    base = model.weights().tensors
    whole = {name: tensors[name] if name in tensors else base[name] for name in shapes}
    for kind in formats:
        if kind == "comfyui":
            paths.append(write_safetensors(folder / f"{model.name}-comfyui.safetensors", rename(whole, original_names(model.denoiser, shapes)), about, dtype))
        else:
            paths.append(write_folder(folder / "transformer", whole, model, about, dtype))
    return paths


def fold_alpha(tensors: Mapping[str, Lazy], adapter: AdapterConfig) -> dict[str, Tensor]:
    """Adapters whose B is multiplied by alpha / rank: readers that know no alpha take it to be the rank."""
    scale = (adapter.alpha or adapter.rank) / adapter.rank
    return {n: t * scale if scale != 1 and n.endswith(".lora_B.weight") else t for n, t in tensors.items()}


def write_folder(folder: Path, tensors: Mapping[str, Tensor], model: DiffusionModel, about: Mapping[str, str], dtype: torch.dtype, limit: int = 10 << 30) -> Path:
    """A diffusers component folder: config.json and weights in files of at most about ``limit`` bytes."""
    aside = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * dtype.itemsize
        if groups[-1] and size + bytes_ > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += bytes_
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        name = "diffusion_pytorch_model.safetensors" if len(groups) == 1 else f"diffusion_pytorch_model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(aside / name, group, about, dtype)
        weight_map |= dict.fromkeys(group, name)
    if len(groups) > 1:
        total = sum(t.numel() * dtype.itemsize for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (aside / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = {**model.denoiser_config, "_class_name": model.denoiser}
    (aside / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def metadata(config: Config) -> dict[str, str]:
    """What the header of an exported file says about where it comes from."""
    about: dict[str, Any] = {
        "diffpipe.version": __version__,
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


