"""Chroma attends the caption, one token of padding and the whole image, each sample its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.flow import Key
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from tests.families import CAPTIONS, encoded, encoders_of, filled


@pytest.fixture
def model(toys: Callable[[str], Path]) -> DiffusionModel:
    return make_model(ModelConfig(family="chroma", path=str(toys("chroma")), dtype="float32"), ObjectiveConfig())


@torch.no_grad()
def output(model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
    inputs, _ = model.prepare(batch, [Key(0, 0, i, 0) for i in range(len(batch["text"]))])
    return filled(model.load_denoiser())(**inputs, return_dict=False)[0]


def test_the_caption_and_one_token_of_padding_are_attended(model: DiffusionModel) -> None:
    encoders = encoders_of(model)
    text = model.encode_text(encoders, CAPTIONS)
    lengths = [len(encoders.pipeline.tokenizer(caption).input_ids) for caption in CAPTIONS]
    assert text["attended"].dtype == torch.bool
    assert text["attended"].tolist() == [[i <= length for i in range(16)] for length in lengths]


def test_what_is_not_attended_changes_nothing_and_what_is_does(model: DiffusionModel) -> None:
    batch = encoded(model)
    plain = output(model, batch)
    others = batch["text"] + torch.randn(batch["text"].shape, generator=torch.Generator().manual_seed(1))
    hidden = torch.where(batch["attended"][..., None], batch["text"], others)
    assert not torch.equal(hidden, batch["text"])
    torch.testing.assert_close(output(model, {**batch, "text": hidden}), plain)
    last = torch.nn.functional.one_hot(batch["attended"].sum(1) - 1, 16).bool()
    changed = output(model, {**batch, "text": torch.where(last[..., None], others, batch["text"])})
    assert ((changed - plain).abs().amax((1, 2)) > 1e-3).all()


def test_a_sample_attends_its_own_caption_whatever_stands_beside_it(model: DiffusionModel) -> None:
    batch = encoded(model)
    together = output(model, batch)
    alone = output(model, {n: t[:1] for n, t in batch.items()})
    torch.testing.assert_close(together[:1], alone)
