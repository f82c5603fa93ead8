"""What is sampled through the stages is what the released pipeline of diffusers makes of the same weights, seed and steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffpipe.config.schema import Config
from diffpipe.encode import prepare_prompts
from diffpipe.errors import ConfigError
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.models.base import DiffusionModel
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.prompts import read_prompts
from diffpipe.sampling import Conditions, Sampler
from tests.conftest import World
from tests.families import CAPTIONS, CPU
from tests.sampling_program import SEED, STEPS, after_a_shortage, conditions_of, config_of, opened, picture

Toys = Callable[[str], Path]
Alone = Callable[[str], tuple[DiffusionModel, Conditions, Tensor]]
SAMPLED = sorted(family for family in MODELS if model_class(family).guided is not None)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def sampled(config: Config, **given: Any) -> tuple[DiffusionModel, Conditions, Tensor]:
    with open_mesh(config.mesh) as mesh:
        model, pipeline = opened(config, mesh)
        wanted = conditions_of(model, **given)
        stepped: list[int] = []
        latents = Sampler(model, pipeline).sample(wanted, config.preview, stepped=stepped.append)
        assert stepped == [*range(1, config.preview.steps + 1)], "each step is told of, in every family"
        return model, wanted, latents


def released(model: DiffusionModel, folder: Path, wanted: Conditions, **given: Any) -> Tensor:
    """What the diffusers pipeline itself makes of text: pixels B C F H W in [0, 1]."""
    pipeline: Any = getattr(diffusers, model.pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    height, width = wanted.height, wanted.width
    given = {"prompt": CAPTIONS[0], "height": height, "width": width, "num_inference_steps": STEPS, **given}
    if model.geometry.fps:
        given["num_frames"] = wanted.frames
    if model.name not in ("sdxl", "hunyuan-video"):
        given["max_sequence_length"] = len(wanted.text["text"])
    if model.name == "flux-kontext":
        given |= {"image": wanted.shown["latents"][None], "max_area": height * width}
    if model.name == "wan-i2v":
        given["image"] = Image.fromarray(((picture(height, width)[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    if model.name == "chroma":
        # It makes its masks of ones and zeros, which are added to the scores of attention and mask nothing.
        text, _, mask, against, _, other = pipeline.encode_prompt(
            given.pop("prompt"), negative_prompt="", device="cpu", max_sequence_length=given["max_sequence_length"]
        )
        given |= {"prompt_embeds": text, "prompt_attention_mask": mask.bool()}
        given |= {"negative_prompt_embeds": against, "negative_prompt_attention_mask": other.bool()}
    with torch.no_grad():
        (pixels,) = pipeline(**given, generator=torch.Generator().manual_seed(SEED), output_type="pt", return_dict=False)
    return pixels.unsqueeze(2) if pixels.ndim == 4 else pixels.transpose(1, 2)


def seen(model: DiffusionModel, latents: Tensor) -> Tensor:
    """Latents decoded as previews are, as pixels in [0, 1]."""
    with torch.inference_mode():
        return (model.decode_media(model.load_decoder(CPU), latents) / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def alone(toys: Toys) -> Alone:
    """Gives what one stage samples of a family, sampled when it is first asked for."""
    return cache(lambda family: sampled(config_of(family, toys(family))))


@pytest.mark.parametrize("family", SAMPLED)
def test_a_sample_is_that_of_the_diffusers_pipeline(family: str, toys: Toys, alone: Alone) -> None:
    model, wanted, latents = alone(family)
    torch.testing.assert_close(seen(model, latents), released(model, toys(family), wanted), **CLOSE)


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_guidance_and_negative_prompts_are_those_of_the_pipeline(family: str, toys: Toys) -> None:
    given = {"negative_prompt": CAPTIONS[1], "guidance_scale": 2.5}
    model, wanted, latents = sampled(config_of(family, toys(family), preview={"guidance": 2.5}), negative=CAPTIONS[1])
    torch.testing.assert_close(seen(model, latents), released(model, toys(family), wanted, **given), **CLOSE)


def test_trained_text_encoders_encode_the_prompt(toys: Toys) -> None:
    model, wanted, latents = sampled(config_of("sdxl", toys("sdxl"), model={"train_text_encoders": True}))
    torch.testing.assert_close(seen(model, latents), released(model, toys("sdxl"), wanted, negative_prompt=""), **CLOSE)


def test_a_model_trained_to_predict_v_is_sampled_as_one(toys: Toys) -> None:
    config = config_of("sdxl", toys("sdxl"), objective={"prediction": "v"})
    scheduler = make_model(config.model, config.objective).load_scheduler()
    told = scheduler.config
    assert (told.prediction_type, told.rescale_betas_zero_snr, told.timestep_spacing) == ("v_prediction", True, "trailing")


def test_two_stages_give_what_one_gives(world: World, toys: Toys, alone: Alone, tmp_path: Path) -> None:
    expected = {family: alone(family)[2] for family in SAMPLED}
    world(2, "tests/sampling_program.py", 2, toys("flux").parent.parent, tmp_path / "made", *SAMPLED)
    made = load_file(tmp_path / "made")
    for family, latents in expected.items():
        torch.testing.assert_close(made[family], latents, **CLOSE)
    assert torch.equal(made["flux again"], made["flux"]), "a stage without memory, or one that gives up, spoils no later sample"


def test_streamed_weights_give_what_resident_ones_give_also_behind_a_shortage(toys: Toys) -> None:
    adapter = {"adapter": {"rank": 2}}
    _, wanted, resident = sampled(config_of("flux", toys("flux"), **adapter))
    for order in ("microbatch", "layer"):
        config = config_of("flux", toys("flux"), **adapter, memory={"swap": "all", "order": order})
        with open_mesh(config.mesh) as mesh:
            model, pipeline = opened(config, mesh)
            sampler = Sampler(model, pipeline)
            assert torch.equal(sampler.sample(wanted, config.preview), resident)
            assert torch.equal(after_a_shortage(sampler, pipeline, wanted, config), resident)


@pytest.mark.parametrize(
    ("family", "preview", "told"),
    [
        ("cosmos", {"prompts": ["x"]}, "cosmos cannot be sampled yet"),
        ("flux", {"prompts": [{"prompt": "x", "negative": "y"}]}, "preview.prompts.0.negative: flux has no use for it"),
        ("flux", {"prompts": ["x"], "negative": "y"}, "preview.negative: flux has no use for it"),
        ("flux", {"prompts": ["x"], "width": 50}, "preview.width: 50 pixels\n  expected: a multiple of 16 for flux\n  fix: set it to 48"),
        ("flux", {"prompts": ["x"], "frames": 5}, "preview.frames: 5 frames\n  expected: 1, for flux makes pictures"),
        ("wan", {"prompts": [{"prompt": "x", "frames": 7}]}, "preview.prompts.0.frames: 7 frames\n  expected: 4 k + 1 for wan"),
        ("wan", {"prompts": [{"prompt": "x", "image": "y.png"}]}, "preview.prompts.0.image: wan has no use for it"),
        ("wan-i2v", {"prompts": ["x"]}, "preview.prompts.0.image: wan-i2v needs a picture to begin from"),
        ("wan-i2v", {"prompts": [{"prompt": "x", "image": "no.png"}]}, "preview.prompts.0.image: no.png: cannot be read"),
    ],
)
def test_what_cannot_be_sampled_is_told_before_anything_is_encoded(family: str, preview: dict[str, Any], told: str, toys: Toys) -> None:
    config = config_of(family, toys(family), preview=preview)
    with pytest.raises(ConfigError) as fault:
        read_prompts(config, make_model(config.model, config.objective))
    assert told in str(fault.value)


@pytest.mark.parametrize("family", ["flux-kontext", "lumina2", "wan-i2v"])
def test_prompts_are_encoded_before_training_into_the_cache(family: str, toys: Toys, alone: Alone, tmp_path: Path) -> None:
    model, wanted, _ = alone(family)
    pixels = ((picture(wanted.height, wanted.width)[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(tmp_path / "shown.png")
    prompt: dict[str, Any] = {"prompt": CAPTIONS[0], "height": wanted.height, "width": wanted.width, "frames": wanted.frames}
    if model.takes_image:
        prompt["image"] = str(tmp_path / "shown.png")
    config = config_of(family, toys(family), preview={"prompts": [prompt], "seed": SEED}, data={"cache_dir": str(tmp_path)})
    made = prepare_prompts(config, model, read_prompts(config, model), device=CPU).conditions(0)
    again = prepare_prompts(config, model, read_prompts(config, model), device=torch.device("meta")).conditions(0)
    for one in (made, again):
        assert (one.seed, one.frames, one.height, one.width) == (wanted.seed, wanted.frames, wanted.height, wanted.width)
        torch.testing.assert_close((one.text, one.negative, one.shown), (wanted.text, wanted.negative, wanted.shown))


def test_sizes_that_nobody_names_are_those_of_the_data(toys: Toys) -> None:
    config = config_of("wan", toys("wan"), data={"resolutions": [64, 128], "frames": [1, 9, 18]}, preview={"prompts": ["x"]})
    (prompt,) = read_prompts(config, make_model(config.model, config.objective))
    assert str(prompt.bucket) == "17x128x128"
