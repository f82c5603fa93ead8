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
from torch.distributed.tensor import DTensor

from diffpipe import __version__
from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError, DiffpipeError
from diffpipe.export.files import cast, write_json, write_safetensors
from diffpipe.models.adapter_files import joined_layers, name_adapter
from diffpipe.models.adapters import adapter_tensors, folded, resolve_targets
from diffpipe.models.base import DiffusionModel
from diffpipe.models.weights import STEMS, open_files
from diffpipe.pipeline.mesh import Mesh
from diffpipe.pipeline.shard import joined, local, piece_name


def export_weights(
    config: Config, model: DiffusionModel, module: nn.Module, mesh: Mesh, folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Write what all stages have trained into ``folder``; every rank calls this, and gets the paths.

    Ranks pass their weights through files, since the whole of them may fit no single one.

    Raises:
        DiffpipeError: on every rank, when any stage's part or an export cannot be written.
    """
    parts = folder.with_name(f".{folder.name}-parts")
    files = {(stage, shard): parts / f"stage-{stage}-{shard}.safetensors" for stage in range(mesh.stages) for shard in range(mesh.shards)}
    fault: DiffpipeError | None = None
    if mesh.replica < mesh.shards:
        # Whole weights are rounded here, once; adapters stay as they are until alpha is folded in.
        held = adapter_tensors(module) if config.adapter is not None else module.state_dict()
        own = {name: local(t) for name, t in held.items() if mesh.shard == 0 or isinstance(t, DTensor)}
        own = own if config.adapter is not None else cast(own, kinds(config, model))
        own = {piece_name(n, mesh.shard, mesh.shards) if isinstance(held[n], DTensor) else n: t for n, t in own.items()}
        try:
            write_safetensors(files[mesh.stage, mesh.shard], own, {})
        except DiffpipeError as failed:
            fault = failed
    try:
        if faults := [f for f in mesh.exchange(fault) if f is not None]:
            raise faults[0]
        # Just these files: a killed export on more stages may have left others.
        return mesh.decide(lambda: export_tensors(config, model, joined(open_files(files.values())), folder, formats))
    finally:
        mesh.barrier()
        if mesh.reporter:
            shutil.rmtree(parts, ignore_errors=True)


def export_tensors(
    config: Config, model: DiffusionModel, tensors: Mapping[str, Tensor], folder: Path, formats: Sequence[str]
) -> list[Path]:
    """Write trained weights into ``folder`` in each format.

    Args:
        tensors: adapters by plain name (``<layer>.lora_A.weight``), or full weights by diffusers name; what a full fine-tune
            left frozen may be missing and is taken from the base.

    Raises:
        DiffpipeError: when a file cannot be written.
    """
    if config.adapter is not None:
        inside = folded(tensors, config.adapter)
        about = metadata(config, model)
        return [
            write_adapter(inside, model, kind, folder / f"{model.name}-{config.adapter.kind}-{kind}.safetensors", _dtype(config), about)
            for kind in formats
        ]
    base = model.weights().tensors
    whole = {name: tensors[name] if name in tensors else base[name] for name in model.shapes}
    components = {name: cast(own, kinds(config, model)) for name, own in model.components(whole).items()}
    paths: list[Path] = []
    for kind in formats:
        about = {**metadata(config, model), "diffpipe.format": kind}
        if kind == "comfyui":
            paths.append(write_safetensors(folder / f"{model.name}-comfyui.safetensors", model.single_file(components), about))
        else:
            paths += [write_component(folder, name, own, model, about) for name, own in components.items()]
    return paths


def write_adapter(
    tensors: Mapping[str, Tensor], model: DiffusionModel, kind: str, path: Path, dtype: torch.dtype, about: Mapping[str, str]
) -> Path:
    """Write adapters by plain name, alpha inside, under the names of a format.

    Raises:
        DiffpipeError: when the format cannot hold them, or the file cannot be written.
    """
    named = cast(name_adapter(tensors, model, kind), lambda _: dtype)
    # AUTOMATIC1111's and Forge's web UIs take an adapter whose header does not say this for one of Stable Diffusion 1.
    version = {"ss_base_model_version": model.base_version} if model.base_version else {}
    return write_safetensors(path, named, {**about, **version, "diffpipe.format": kind})


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.export.dtype or config.model.dtype)


def kinds(config: Config, model: DiffusionModel) -> Callable[[str], torch.dtype]:
    """What type a whole weight is exported in: the config's, or float32 where the diffusers class keeps that on loading."""
    insists = set(model.denoiser_class()._keep_in_fp32_modules or [])
    return lambda name: torch.float32 if insists & set(name.split(".")) else _dtype(config)


def write_component(
    home: Path, name: str, tensors: Mapping[str, Tensor], model: DiffusionModel, about: Mapping[str, str], limit: int = 10 << 30
) -> Path:
    """The folder of a component of a diffusers pipeline in ``home``: config.json, and weights in files of at most about ``limit`` bytes.

    Raises:
        DiffpipeError: when it cannot be written; an earlier one of that name stays.
    """
    folder, aside, earlier = home / name, home / f".{name}-unfinished", home / f".{name}-earlier"
    shutil.rmtree(aside, ignore_errors=True)
    stem = STEMS[model.blueprint[name].library]
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for weight, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.dtype.itemsize
        if groups[-1] and size + bytes_ > limit:
            groups.append({})
            size = 0
        groups[-1][weight] = tensor
        size += bytes_
    weight_map: dict[str, str] = {}
    try:
        for i, group in enumerate(groups):
            place = f"-{i + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            file = f"{stem}{place}.safetensors"
            write_safetensors(aside / file, group, about)
            weight_map |= dict.fromkeys(group, file)
        if len(groups) > 1:
            total = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
            write_json(aside / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(aside / "config.json", model.folder_config(name))
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


def metadata(config: Config, model: DiffusionModel) -> dict[str, str]:
    """What the header of an exported file says about where it comes from."""
    about: dict[str, Any] = {
        "diffpipe.version": __version__,
        "diffpipe.family": config.model.family,
        "diffpipe.base": config.model.files.get(model.component) or config.model.path,
        "diffpipe.config_hash": config_hash(config),
    }
    if config.adapter is not None:
        # alpha / rank is inside the factors, so for a reader alpha is the rank.
        about |= {"diffpipe.rank": config.adapter.rank, "diffpipe.alpha": config.adapter.alpha or config.adapter.rank}
    return {k: str(v) for k, v in about.items()}


def config_hash(config: Config) -> str:
    return hashlib.blake2b(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode(), digest_size=8).hexdigest()


def check_formats(config: Config, model: DiffusionModel) -> None:
    """Find out before training, not after it, that a format cannot be written.

    Raises:
        DiffpipeError: when a parameter has no original name, the format cannot hold what is trained, or what comes along is not there.
    """
    formats = config.export.formats
    if config.adapter is None:
        if "kohya" in formats:
            raise ConfigError("kohya names are for adapters", where="export.formats", expected="diffusers or comfyui for whole weights")
        components = model.components(model.weights().tensors)
        if "comfyui" in formats:
            model.single_file(components)
    elif config.adapter.kind == "lokr" and {"comfyui", "kohya"} & set(formats):
        module = model.load_denoiser()
        if joined := joined_layers(model, resolve_targets(model, module, config.adapter)):
            raise ConfigError(
                f"the original format joins {joined[0]} with other layers, which a LoKr cannot follow",
                where="export.formats",
                fix="export as diffusers, take adapter.kind lora, or take such layers out with adapter.exclude",
            )
    elif {"comfyui", "kohya"} & set(formats):
        model.original_names()
