"""The frozen half of a pipeline: VAE and text encoders of a diffusers folder, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpipe.errors import CheckpointError

PARTS = {"media": ("vae",), "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}


@dataclass
class Encoders:
    """What turns media and captions into tensors.

    Attributes:
        pipeline: the diffusers pipeline without its transformer; its own ``encode_prompt`` encodes text.
        device: where the encoders are.
    """

    pipeline: Any
    device: torch.device

    @property
    def vae(self) -> Any:
        return self.pipeline.vae


def diffusers_module() -> Any:
    """diffusers, without its own loading bars between ours."""
    import diffusers
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return diffusers


def check_folder(folder: Path, denoiser: str) -> Path:
    """The folder, when it is a diffusers pipeline whose transformer is a ``denoiser``.

    Raises:
        CheckpointError: when it is not.
    """
    if not (folder / "model_index.json").is_file():
        found = "a folder without model_index.json" if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder}: {found}",
            where="model.path",
            expected="a model in the diffusers folder format (model_index.json, transformer/, vae/, text_encoder/ ...)",
            fix="download the model's diffusers repository, and name its folder; a single file goes to model.transformer beside it",
        )
    config = folder / "transformer" / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    if found != denoiser:
        raise CheckpointError(
            f"{folder} holds {found or 'no transformer/config.json'}",
            where="model.path",
            expected=f"transformer/config.json of a {denoiser}",
            fix="change model.path or model.family",
        )
    return folder


def load_encoders(folder: Path, pipeline: str, dtype: torch.dtype, device: torch.device) -> Encoders:
    """The encoders of a diffusers folder; the VAE in float32, text encoders in ``dtype``.

    Raises:
        CheckpointError: when a component is missing or cannot be read.
    """
    try:
        loaded = getattr(diffusers_module(), pipeline).from_pretrained(folder, transformer=None, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise CheckpointError(f"the encoders in {folder} cannot be loaded: {str(fault).splitlines()[0]}", where="model.path") from fault
    loaded.set_progress_bar_config(disable=True)
    loaded.vae.to(torch.float32)
    for component in loaded.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval().to(device)
    return Encoders(loaded, device)


def fingerprint(folder: Path, part: str, samples: int = 64, chunk: int = 1 << 16) -> str:
    """A hash of the encoders of ``part``: names and sizes of their files, and evenly spaced pieces of each.

    Pieces rather than every byte: reading a 20 GB text encoder at every start would take longer than encoding a
    small data set, and weights that were trained further differ everywhere.
    """
    digest = hashlib.blake2b(digest_size=16)
    for component in PARTS[part]:
        for file in sorted(p for p in (folder / component).rglob("*") if p.is_file()):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()}:{size};".encode())
            with open(file, "rb") as stream:
                for i in range(samples if size > samples * chunk else 1):
                    stream.seek(i * max(0, size - chunk) // max(1, samples - 1))
                    digest.update(stream.read(chunk if size > samples * chunk else -1))
    return digest.hexdigest()
