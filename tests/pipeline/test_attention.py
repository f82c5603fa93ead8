"""Attention kernels that a run asks for."""

from __future__ import annotations

import pytest
import torch

from diffpipe.errors import ConfigError
from diffpipe.pipeline.attention import Attention


def test_flash_attention_4_where_it_cannot_run_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"model.attention: fa4, which runs on cards of compute capability 9 and 10 alone"):
        Attention("fa4", torch.device("cpu"))
