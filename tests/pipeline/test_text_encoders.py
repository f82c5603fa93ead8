"""Trained text encoders before the denoiser: exact gradients on any cut, and a rate of 0 that freezes one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpipe.config.schema import Config, GroupConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from diffpipe.errors import ConfigError
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.models.base import DiffusionModel
from diffpipe.optim import make_optimizer
from diffpipe.pipeline.build import outline
from diffpipe.pipeline.cut import Fakes, Part, Probe, duplicate, expand
from diffpipe.pipeline.stage import sum_errors
from tests.families import apart, filled, microbatch
from tests.pipeline.test_cut import CPU, cuts_of, run_parts, whole_of

FAMILIES = [family for family in sorted(MODELS) if "model.train_text_encoders" in model_class(family).options]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, toys: Callable[[str], Path]) -> DiffusionModel:
    config = ModelConfig(family=request.param, path=str(toys(request.param)), dtype="float32", train_text_encoders=True)
    return make_model(config, ObjectiveConfig())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_any_cut_gives_the_text_encoders_gradients(model: DiffusionModel, lora: bool) -> None:
    whole = filled(whole_of(model, lora))
    inputs, targets = microbatch(model)
    loss = sum_errors(whole(**inputs, return_dict=False), targets)
    loss.backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    assert expected.keys() == {n for n, p in whole.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in expected} == set(model.trained)
    count = len(expand(whole, model.spec.units))
    fakes = Fakes(CPU)
    for edges in ([0, count], *cuts_of(count)):
        parts = [Part(apart(whole), model.spec, a, b, fakes) for a, b in pairwise(edges)]
        _, got, gradients = run_parts(parts, inputs, targets)
        assert torch.equal(got, loss.detach()), f"cut at {edges}"
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_probe_knows_what_text_encoders_send(model: DiffusionModel) -> None:
    inputs, _ = microbatch(model)
    whole = whole_of(model, False)
    count = len(expand(whole, model.spec.units))
    fakes = Fakes(CPU)
    twins = [Part(duplicate(whole), model.spec, a, b, fakes) for a, b in ((0, 1), (1, count))]
    for twin in twins:
        fakes.fill(twin)
    border = Probe(twins, fakes, nullcontext, model.spec.lengths).borders(inputs)[0]
    sent, layout = Part(filled(whole), model.spec, 0, 1, Fakes(CPU))((), None, inputs)
    assert layout == border.layout
    assert [(t.shape, t.dtype, t.requires_grad) for t in sent] == [(t.shape, t.dtype, t.requires_grad) for t in border.tensors]


@pytest.mark.parametrize("adapter", [None, {"rank": 2}], ids=["full", "lora"])
def test_a_rate_of_zero_freezes_an_encoder(model: DiffusionModel, adapter: dict[str, Any] | None) -> None:
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "model": model.config.model_dump(),
            "data": {"folders": [{"path": "unused"}]},
            "adapter": adapter,
            "optimizer": {"lr": 1e-4, "groups": [{"match": r"^text_encoder\.", "lr": 0}, {"match": "^text_encoder_2", "lr": 1e-6}]},
        }
    )
    whole, _ = outline(config, model)
    assert {n.split(".")[0] for n, p in whole.named_parameters() if p.requires_grad} == {model.component, "text_encoder_2"}
    groups = make_optimizer(config.optimizer, whole.named_parameters()).param_groups
    rates = {name.split(".")[0]: group["lr"] for group in groups for name in group["names"]}
    assert rates == {model.component: 1e-4, "text_encoder_2": 1e-6}
    other = config.model_copy(update={"optimizer": OptimizerConfig(groups=[GroupConfig(match="^text_encoder_3", lr=1e-6)])})
    with pytest.raises(ConfigError, match=r"optimizer\.groups: '\^text_encoder_3' finds no parameter that trains"):
        outline(other, model)
