"""Previews of whole runs, through the command line: files, records, and no trace of them in what is trained."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffpipe.checkpoint import list_checkpoints
from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.data.files import File
from diffpipe.data.media import probe, write
from diffpipe.data.videos import read
from diffpipe.models import make_model
from diffpipe.models.encoders import halve_tiles
from diffpipe.models.flux import Flux
from diffpipe.sample import config_of
from tests.conftest import Command, World
from tests.families import CPU, frames_of
from tests.test_train import PROGRAM, arguments

PROMPTS = "[a red circle on a blue background, {prompt: a green square, seed: 3, width: 96}, a triangle]"
ASKED = {"preview.prompts": PROMPTS, "preview.every_steps": 2, "preview.at_start": "true", "preview.steps": 2}
QUICK = {"eval.sets": "[]", "checkpoint.every_steps": "null", "export.formats": "[diffusers]"}
WAN = {"model.family": "wan", "model.path": "toy:wan", "data.folders": "[{path: toy:clips}]", "data.frames": "[1, 9]"}


def run_of(folder: Path) -> Path:
    (found,) = [path.parent for path in folder.glob("*/config.yaml")]
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "exports/step-00000004/transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def flux(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with previews, of which the second at the start finds no memory."""
    home = tmp_path_factory.mktemp("flux") / "run"
    decode, asked = Flux.decode_media, []

    def short(*given: Any) -> Any:
        asked.append(given)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return decode(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux, "decode_media", short)
        command(*arguments(home, **{"mesh.stages": 1, **QUICK, **ASKED}))
    return run_of(home)


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def test_previews_are_files_by_step_and_change_nothing_that_is_trained(flux: Path, command: Command) -> None:
    made = {p.relative_to(flux / "previews").as_posix() for p in (flux / "previews").rglob("*.png")}
    left_out = {"step-00000000/01.png"}
    assert made == {f"step-{step:08d}/{number:02d}.png" for step in (0, 2, 4) for number in range(3)} - left_out
    assert picture(flux / "previews/step-00000004/01.png").shape == (64, 96, 3)
    assert (picture(flux / "previews/step-00000000/00.png") != picture(flux / "previews/step-00000004/00.png")).any()
    without = flux.parent.parent / "without"
    command(*arguments(without, **{"mesh.stages": 1, **QUICK}))
    with_them, plain = weights(flux), weights(run_of(without))
    assert with_them.keys() == plain.keys() and all(torch.equal(with_them[name], plain[name]) for name in plain)


def test_a_preview_is_the_picture_that_diffusers_makes_with_the_exported_weights(flux: Path) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    trained: Any = FluxTransformer2DModel.from_pretrained(flux / "exports/step-00000004/transformer")
    pipeline: Any = FluxPipeline.from_pretrained(flux.parent / "toy/flux-v2", transformer=trained)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    (expected,) = pipeline(
        "a red circle on a blue background",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).images
    difference = np.abs(picture(flux / "previews/step-00000004/00.png").astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1


def test_a_preview_without_memory_is_left_out_and_told_of(flux: Path) -> None:
    told = "warning: preview 1 of step 0 is left out (1 so far): memory: the memory of cpu ran out in decoding preview 1, 1x64x96"
    log = (flux / "log.txt").read_text(encoding="utf-8")
    assert told in log and log.count("preview steps 6 of 6") == 3


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_signal_does_not_wait_for_all_previews(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Flux.decode_media

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # a thread takes it
        return decode(*given)

    monkeypatch.setattr(Flux, "decode_media", interrupted)
    done = command(*arguments(tmp_path / "run", **{"mesh.stages": 1, **QUICK, **ASKED}), check=False)
    run = run_of(tmp_path / "run")
    assert done.exit_code == 75 and "previews of step 0 were given up" in (run / "log.txt").read_text(encoding="utf-8")
    assert [p.name for p in run.rglob("previews/*/*")] == ["00.png"]
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step-00000001"]


def test_a_vae_without_memory_takes_smaller_tiles(toys: Callable[[str], Path]) -> None:
    for family in ("sdxl", "wan"):
        model = make_model(ModelConfig(family=family, path=str(toys(family))), ObjectiveConfig())
        decoder = model.load_decoder(CPU)
        vae = decoder.vae
        if family == "sdxl":  # the released one's
            vae.tile_sample_min_size, vae.tile_latent_min_size = 1024, 128
        frames = frames_of(model)
        latents = torch.randn(1, *model.blank_media(frames, 160, 160)["latents"].shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            whole = model.decode_media(decoder, latents)
            sizes = 0
            while halve_tiles(vae):
                sizes += 1
                assert model.decode_media(decoder, latents).shape == whole.shape == (1, 3, frames, 160, 160)
        assert sizes == (3 if family == "sdxl" else 1)


def test_tensorboard_has_the_pictures_and_what_was_asked_for(flux: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(flux / "tensorboard"), {"images": 0})
    events.Reload()
    shown = events.Images("preview/1")
    assert [each.step for each in shown] == [2, 4]
    assert shown[-1].encoded_image_string == (flux / "previews/step-00000004/01.png").read_bytes()
    about = events.SummaryMetadata("preview/1")
    assert about.summary_description == about.display_name == "a green square"
    assert about.data_class and about.plugin_data.plugin_name == "images", "without them the heading is not shown"


def test_a_run_is_sampled_again_from_its_checkpoint(flux: Path, command: Command, tmp_path: Path) -> None:
    done = command("sample", flux, "--prompt", "a red circle on a blue background", "--seed", "0", "--steps", "2")
    assert str(flux / "samples/step-00000004") in done.stdout.replace("\n", "")
    assert (picture(flux / "samples/step-00000004/00.png") == picture(flux / "previews/step-00000004/00.png")).all()
    asked = ("--prompt", "a red circle on a blue background", "--seed", "0", "--steps", "2", "--out", tmp_path / "streamed")
    done = command("sample", flux, *asked, "--set", "memory.budget=1MiB")
    assert "memory.swap: 8 (sampling" in done.stdout and "for which memory runs out is left out" in done.stdout + done.stderr
    assert (picture(tmp_path / "streamed/00.png") == picture(flux / "previews/step-00000004/00.png")).all()
    command("sample", flux, "--prompt", "a square", "--width", "32", "--height", "48", "--steps", "1")
    assert picture(flux / "samples/step-00000004-2/00.png").shape == (48, 32, 3), "the first is kept"
    for wrong, told in (
        (["--prompt", "x", "--checkpoint", "3"], "no checkpoint of step 3"),
        (["--prompt", "x", "--image", "y.png"], "flux has no use for it"),
        (["--negative", "y"], "--negative: the run's own prompts are sampled"),
        (["--steps", "0"], "preview.steps"),
    ):
        failed = command("sample", flux, *wrong, check=False)
        assert failed.exit_code == 1 and told in failed.stderr and "Traceback" not in failed.stderr
    (tmp_path / "config.yaml").write_text((flux / "config.yaml").read_text().replace("stages: 1", "stages: 2"))
    meshes = [config_of(tmp_path, given, [], {}).mesh.stages for given in ([], ["mesh.schedule=1f1b"])]
    assert meshes == [1, 2], "one process samples what two have trained"


def test_replicas_that_share_weights_share_out_the_prompts(flux: Path, world: World, tmp_path: Path) -> None:
    settings = {**QUICK, **ASKED, "mesh.stages": 1, "mesh.shard": 2, "batch.accumulate": 1, "preview.every_steps": "null"}
    world(2, *PROGRAM, *arguments(tmp_path / "run", **settings))
    for name in ("step-00000000/00.png", "step-00000000/02.png", "step-00000004/01.png", "step-00000004/02.png"):
        own, alone = (picture(run / "previews" / name).astype(int) for run in (run_of(tmp_path / "run"), flux))
        assert np.abs(own - alone).max() <= 1


def test_clips_are_videos_and_a_sample_needs_no_prompts_in_the_config(command: Command, tmp_path: Path) -> None:
    command(*arguments(tmp_path / "run", **{"mesh.stages": 1, **QUICK, **WAN, "run.steps": 1}))
    run = run_of(tmp_path / "run")
    assert not (run / "previews").exists()
    command("sample", run, "--prompt", "a red circle moving left", "--negative", "a square", "--steps", "2", "--frames", "9")
    info = probe(File(run / "samples/step-00000001/00.mp4"))
    assert (info.kind, info.frames, info.width, info.height, info.fps) == ("video", 9, 64, 64, 16.0)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    ramp = torch.linspace(-1, 1, 64).expand(3, 5, 32, 64) * torch.linspace(0.2, 1, 5).view(1, 5, 1, 1)
    still = write(ramp[:, :1], 16, tmp_path / "still")
    assert still.path.name == "still.png" and still.thumbnail == still.path.read_bytes()
    expected = ((ramp / 2 + 0.5) * 255).round().permute(1, 2, 3, 0).numpy()
    assert (picture(still.path) == expected[0]).all()
    clip = write(ramp, 16, tmp_path / "clip")
    frames = read(File(clip.path), 5, (64, 32), 16).astype(float)
    assert np.abs(frames - expected).mean() < 3, "but for what the codec loses"
    with Image.open(io.BytesIO(clip.thumbnail)) as moving:
        assert (getattr(moving, "n_frames", 1), moving.size) == (5, (64, 32))
