"""The family that diffpipe/models/README.md adds from nothing trains, cuts and exports like the others."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from diffpipe.config.schema import Config
from diffpipe.models import MODELS, make_model
from diffpipe.models.base import DiffusionModel, StageSpec
from diffpipe.pipeline.cut import Fakes, Part, expand
from diffpipe.pipeline.stage import sum_errors
from diffpipe.toy.tiny import make_image_vae, make_t5, make_t5_tokenizer, open_heads, pictures_for_scale
from diffpipe.train import train
from tests.conftest import ROOT
from tests.families import CPU, encoded, microbatch, with_weights
from tests.pipeline.test_cut import run_parts


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """AuraFlow, registered from the code on the page."""
    page = (ROOT / "diffpipe/models/README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class AuraFlow" in block)
    (tmp_path / "auraflow_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(MODELS, "auraflow", "auraflow_of_the_page:AuraFlow")
    monkeypatch.delitem(sys.modules, "auraflow_of_the_page", raising=False)
    return "auraflow"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    folder = tmp_path_factory.mktemp("auraflow")
    torch.manual_seed(0)
    tokenizer = make_t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pos_embed_max_size=256,
    )
    AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=make_t5("UMT5", tokenizer),
        vae=make_image_vae(pictures_for_scale(frames=0), 4),
        transformer=open_heads(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def config_of(family: str, checkpoint: Path, output: Path, **more: object) -> Config:
    raw = {
        "output_dir": output,
        "run": {"steps": 30},
        "batch": {"micro": 4, "accumulate": 1},
        "model": {"family": family, "path": str(checkpoint), "dtype": "float32"},
        "optimizer": {"lr": 3e-3},
        "data": {"folders": [{"path": "toy:pictures"}], "resolutions": [64], "workers": 0, "encode_workers": 0},
        "eval": {"quantiles": [0.5], "sets": [{"name": "held", "folders": [{"path": "toy:pictures-heldout"}]}]},
        **more,
    }
    return Config.model_validate(raw)


def model_of(config: Config) -> DiffusionModel:
    return make_model(config.model, config.objective)


def test_it_trains(family: str, checkpoint: Path, tmp_path: Path) -> None:
    run = train(config_of(family, checkpoint, tmp_path / "out"), resume=None, make_sinks=list)
    losses = [float(x) for x in re.findall(r"eval/held/loss (\S+)", (run / "log.txt").read_text())]
    assert losses[-1] < 0.8 * losses[0]
    assert (run / "exports/step-00000030/transformer/config.json").is_file()


def test_its_lora_loads_in_diffusers(family: str, checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import AuraFlowPipeline

    run = train(config_of(family, checkpoint, tmp_path / "out", run={"steps": 2}, adapter={"rank": 4}), resume=None, make_sinks=list)
    pipeline = AuraFlowPipeline.from_pretrained(checkpoint)
    pipeline.load_lora_weights(run / "exports/step-00000002/auraflow-lora-diffusers.safetensors")
    assert pipeline.get_active_adapters()


def test_its_cuts_are_the_whole_and_every_carried_module_is_needed(family: str, checkpoint: Path, tmp_path: Path) -> None:
    model = model_of(config_of(family, checkpoint, tmp_path))
    cached, side = encoded(model, 2, 3), model.geometry.multiple
    assert {n: t.shape for n, t in model.blank(1, 2 * side, 3 * side).items()} == {n: t.shape[1:] for n, t in cached.items()}
    inputs, targets = microbatch(model)
    whole = with_weights(model.load_denoiser().requires_grad_(True), model)
    output = whole(**inputs, return_dict=False)[0]
    sum_errors((output,), targets).backward()
    count = len(expand(whole, model.spec.units))
    for edges in ([0, 2, count], list(range(count + 1))):
        parts = [
            Part(with_weights(model.load_denoiser().requires_grad_(True), model), model.spec, a, b, Fakes(CPU)) for a, b in pairwise(edges)
        ]
        got, _, gradients = run_parts(parts, inputs, targets)
        assert torch.equal(got, output)
        for name, p in whole.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6)
    bare = StageSpec(model.spec.units, (), (), model.spec.post)
    first, last = (Part(with_weights(model.load_denoiser(), model), bare, a, b, Fakes(CPU)) for a, b in ((0, 2), (2, count)))
    payload, layout = first((), None, inputs)
    assert not torch.allclose(last(payload, layout, inputs)[0][0], output, atol=1e-4)
