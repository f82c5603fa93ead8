"""Wan's image to video is conditioned as its pipeline conditions it, and takes no other model's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError
from diffpipe.flow import Key
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.models.names import to_original
from diffpipe.models.weights import realise
from tests.families import CPU, encoders_of

Toys = Callable[[str], Path]


def model_of(family: str, path: Path, file: Path | None = None) -> DiffusionModel:
    files = {} if file is None else {"transformer": file}
    return make_model(ModelConfig(family=family, path=str(path), files=files, dtype="float32"), ObjectiveConfig())


@pytest.fixture(scope="module")
def pipeline(toys: Toys) -> Any:
    return WanImageToVideoPipeline.from_pretrained(toys("wan-i2v"), transformer=None)


def clip(frames: int) -> Tensor:
    """Pixels that 8 bits hold, as those of files are."""
    return torch.randint(0, 256, (2, 3, frames, 48, 64), generator=torch.Generator().manual_seed(frames)) / 127.5 - 1


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_mask_and_latents_of_the_first_frame_are_the_pipelines_own(toys: Toys, pipeline: Any, frames: int) -> None:
    model, pixels = model_of("wan-i2v", toys("wan-i2v")), clip(frames)
    with torch.no_grad():
        batch = model.encode_media(encoders_of(model), pixels)
        own = [
            pipeline.prepare_latents(p[None, :, 0], 1, 4, 48, 64, frames, torch.float32, CPU, torch.Generator().manual_seed(0))[1]
            for p in pixels
        ]
    inputs, _ = model.prepare({**batch, "text": torch.zeros(2, 512, 32)}, [Key(0, 0, i, 0) for i in range(2)])
    torch.testing.assert_close(inputs["hidden_states"][:, 4:], torch.cat(own))


def test_a_picture_conditions_itself(toys: Toys) -> None:
    model = model_of("wan-i2v", toys("wan-i2v"))
    with torch.no_grad():
        batch = model.encode_media(encoders_of(model), clip(1))
    assert torch.equal(batch["condition"], batch["latents"])


def test_image_tokens_are_those_of_the_picture_that_the_first_frame_was(toys: Toys, pipeline: Any) -> None:
    model, pixels = model_of("wan-i2v", toys("wan-i2v")), clip(5)
    pictures = [Image.fromarray(((p[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    with torch.no_grad():
        tokens = model.encode_media(encoders_of(model), pixels)["image"]
        own = torch.cat([pipeline.encode_image(picture, CPU) for picture in pictures])
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(tokens, own)


def test_pictures_are_resized_by_pillow_whatever_else_is_installed(toys: Toys) -> None:
    processor = encoders_of(model_of("wan-i2v", toys("wan-i2v"))).pipeline.image_processor
    picture = ((clip(1)[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    # 64 x 48 to a shorter side of 32, then the middle, then CLIP's mean and deviation.
    resized = np.asarray(Image.fromarray(picture).resize((42, 32), Image.Resampling.BICUBIC))[:, 5:37] / 255
    wanted = (resized - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    got = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(got, torch.from_numpy(wanted).permute(2, 0, 1).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "other"), [("wan", "wan-i2v"), ("wan-i2v", "wan")])
@pytest.mark.parametrize("form", ["folder", "original", "diffusers"])
def test_a_checkpoint_of_the_other_kind_of_wan_names_its_family(toys: Toys, tmp_path: Path, family: str, other: str, form: str) -> None:
    path, file = toys(family), None
    if form == "folder":
        path = toys(other)
    else:
        model = model_of(other, toys(other))
        held = model.weights().tensors
        held = to_original(held, model.original_names()) if form == "original" else held
        file = tmp_path / "other.safetensors"
        save_file({n: realise(t).contiguous() for n, t in held.items()}, file)
    with pytest.raises(CheckpointError, match=rf"set model\.family: {other}$"):
        model_of(family, path, file).weights()


@pytest.mark.parametrize("family", ["wan", "wan-i2v"])
def test_a_model_that_takes_more_channels_without_image_tokens_is_refused(toys: Toys, tmp_path: Path, family: str) -> None:
    path = Path(shutil.copytree(toys(family), tmp_path / "wan2.2"))
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 36, "image_dim": None}))
    with pytest.raises(CheckpointError, match=r"takes 36 channels and no image tokens"):
        model_of(family, path).weights()


def test_names_that_old_conversions_hold_for_nothing_are_passed_over(toys: Toys, tmp_path: Path) -> None:
    base = model_of("wan-i2v", toys("wan-i2v"))
    held = {n: realise(t).contiguous() for n, t in base.weights().tensors.items()}
    held |= {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(64) for i in range(6)}
    save_file(held, tmp_path / "old.safetensors")
    assert model_of("wan-i2v", toys("wan-i2v"), tmp_path / "old.safetensors").weights().names() == base.weights().names()
