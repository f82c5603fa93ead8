"""`diffpipe inspect`: what it tells and shows before a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffpipe.config.schema import Config, ModelConfig, ObjectiveConfig
from diffpipe.errors import DiffpipeError
from diffpipe.inspection import CELL, contact_sheets, decoded_sheets, survey
from diffpipe.models import MODELS, make_model
from diffpipe.toy import materialize
from tests.conftest import Command
from tests.families import CPU, encoders_of, frames_of


def config_of(folder: Path, family: str = "flux", **data: object) -> Config:
    return Config.model_validate(
        {
            "output_dir": folder / "out",
            "run": {"steps": 1},
            "model": {"family": family, "path": f"toy:{family}", "dtype": "float32"},
            "data": {"resolutions": [64], "cache_dir": folder / "cache", **data},
        }
    )


def pictures(folder: Path) -> Path:
    """Three wide pictures, red on the outside and blue in the middle, one of them said to be two things; a file that is none."""
    folder.mkdir(parents=True)
    for name, caption in (("a", "one two three"), ("b", "one"), ("c", None)):
        picture = Image.new("RGB", (200, 100), (255, 0, 0))
        picture.paste((0, 0, 255), (50, 0, 150, 100))
        picture.save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    return folder


def test_the_command_tells_buckets_captions_and_what_is_left_out(command: Command, tmp_path: Path) -> None:
    media = pictures(tmp_path / "media")
    (tmp_path / "cfg.yaml").write_text(
        f"output_dir: {tmp_path / 'out'}\nrun: {{steps: 1}}\n"
        "model: {family: flux, path: 'toy:flux'}\n"
        "batch: {micro: 2}\n"
        f"data: {{folders: [{{path: {media}, repeats: 3}}], resolutions: [64], aspect: {{min: 1, max: 1, count: 1}}}}\n"
    )
    told = command("inspect", tmp_path / "cfg.yaml", "--output", tmp_path / "sheets").stdout
    row = next(line for line in told.splitlines() if "1x64x64" in line)
    assert [int(n) for n in re.findall(r"\b\d+\b", row.replace("1x64x64", ""))] == [3, 9, 4, 1]
    assert "captions: 0 to 3 words, median 1" in told
    assert "no caption: 1 files, such as c.png" in told
    assert "broken.jpg" in told and "left out" in told
    # A square cut from the middle: blue inside the frame, dimmed red outside.
    sheet = Image.open(tmp_path / "sheets" / "train-1x64x64.jpg").convert("RGB")
    assert sheet.size == (3 * CELL[0], CELL[1])
    assert sheet.getpixel((CELL[0] // 2, 55)) == pytest.approx((0, 0, 255), abs=12)
    red, green, _ = sheet.getpixel((CELL[0] // 2 - 80, 55))  # pyright: ignore[reportGeneralTypeIssues]
    assert red > 240 and green == pytest.approx(153, abs=15)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no folder")
    found = survey(materialize(config_of(tmp_path, folders=[{"path": str(pictures(tmp_path / "media"))}]), tmp_path / "toys"))[0]
    with pytest.raises(DiffpipeError, match=r"notes: train-1x\d+x\d+.jpg cannot be written: .*\n.*--output"):
        contact_sheets(found, tmp_path / "notes")


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_decoded_sheets_show_pictures_once_and_clips_in_three_frames(tmp_path: Path, family: str) -> None:
    toy = "clips" if family == "wan" else "pictures"
    config = materialize(config_of(tmp_path, family, folders=[{"path": f"toy:{toy}"}], frames=[9]), tmp_path / "toys")
    sheets = decoded_sheets(config, tmp_path / "sheets", CPU)
    buckets = {str(row.bucket): row.samples for row in survey(config)[0].buckets}
    assert [p.name for p in sheets] == [f"train-{bucket}-decoded.jpg" for bucket in buckets]
    for path, samples in zip(sheets, buckets.values(), strict=True):
        cells = min(samples, 24) if family == "flux" else min(samples, 8) * 3
        assert Image.open(path).height // CELL[1] in (-(-cells // 6), -(-cells // 2 // 6))


@pytest.mark.parametrize("family", sorted(MODELS))
def test_latents_are_decoded_as_the_vae_gave_them(toys: Callable[[str], Path], family: str) -> None:
    model = make_model(ModelConfig(family=family, path=str(toys(family)), dtype="float32"), ObjectiveConfig())
    encoders = encoders_of(model)
    step = model.geometry.multiple
    pixels = torch.rand(1, 3, frames_of(model), 2 * step, 3 * step, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        got = model.decode_media(encoders, model.encode_media(encoders, pixels)["latents"])
        own = encoders.vae.encode(pixels if got.shape[2] > 1 or model.geometry.fps else pixels[:, :, 0]).latent_dist.mode()
        more = [torch.zeros(1)] if getattr(encoders.vae.config, "timestep_conditioning", False) else []
        expected = encoders.vae.decode(own, *more, return_dict=False)[0]
    assert got.shape == pixels.shape
    torch.testing.assert_close(got.squeeze(2), expected.squeeze(2), rtol=1e-4, atol=1e-4)
