"""Attention kernels that a run asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffpipe.errors import ConfigError
from diffpipe.pipeline.attention import Attention
from diffpipe.train import train
from tests.runs_program import prepared


def test_flash_attention_4_where_it_cannot_run_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"model.attention: fa4, which runs on cards of compute capability 9 and 10 alone"):
        Attention("fa4", torch.device("cpu"))


def test_missing_kernels_end_a_run_before_anything_is_encoded(tmp_path: Path) -> None:
    config = prepared("flux", "lora", tmp_path, 1)
    asked = config.model_copy(update={"model": config.model.model_copy(update={"attention": "fa4"})})
    with pytest.raises(ConfigError, match=r"model.attention: fa4"):
        train(asked, resume=None, make_sinks=list)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
