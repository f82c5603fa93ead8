"""Whole runs on a CUDA device. They need one card, so CI leaves them out: ``python -m pytest -m gpu``."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpipe.models import MODELS
from tests.test_train import arguments, losses

World = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_gpu_trains_as_the_cpu_does(world: World, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = world(1, *arguments(family, tmp_path / "gpu", **{"mesh.stages": 1}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = world(1, *arguments(family, tmp_path / "cpu", **{"mesh.stages": 1}))
    assert "device" in next(line for line in on_gpu.stdout.splitlines() if line.startswith("step 4"))
    assert losses(on_gpu.stdout) == pytest.approx(losses(on_cpu.stdout), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_bfloat16_stays_near_float32(world: World, tmp_path: Path, family: str, optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    more = {"mesh.stages": 1, "optimizer.kind": optimizer}
    exact = world(1, *arguments(family, tmp_path / "float32", **more))
    rounded = world(1, *arguments(family, tmp_path / "bfloat16", **more, **{"model.dtype": "bfloat16"}))
    assert losses(rounded.stdout) == pytest.approx(losses(exact.stdout), rel=0.05)


def test_gradients_are_finite_at_the_length_where_cudnn_attention_fails(world: World) -> None:
    program = """
import torch
from diffpipe.pipeline.build import choose_attention

choose_attention("sdpa")
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4608, 24, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
for _ in range(20):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out) * 1e-7)
    assert all(g.isfinite().all() for g in gradients)
"""
    world(1, "-c", program)
