"""Feed-forward layers that take the tokens in parts give what they gave, and hold a part of their width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpipe.models import MODELS, make_model
from diffpipe.pipeline.build import build
from diffpipe.pipeline.memory.cards import CARDS
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.pipeline.rehearsal import Rehearsal
from tests.families import frames_of
from tests.pipeline.test_memory import config_of, steps_of

Toys = Callable[[str], Path]
CHUNKED = {"feed_forward_chunks": 3}


@pytest.mark.parametrize("family", sorted(MODELS))
def test_parts_give_the_whole_in_every_family(toys: Toys, family: str) -> None:
    plain = config_of(family, toys(family), {"rank": 4}, {"recompute": "none"})
    parted = config_of(family, toys(family), {"rank": 4}, {"recompute": "selective", **CHUNKED})
    model = make_model(parted.model, parted.objective)
    with open_mesh(parted.mesh) as mesh:
        module = build(parted, model, mesh).module
    layers = [m for m in module.modules() if hasattr(m, "chunks")]
    assert layers and len({type(m) for m in layers}) == len({type(m).__mro__[1] for m in layers})
    for (loss, gradients, evaluated), (want, wanted, held) in zip(steps_of(parted, rounds=1), steps_of(plain, rounds=1), strict=True):
        assert (loss, evaluated) == pytest.approx((want, held), rel=1e-5)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("memory", [{}, {"compile": True, "recompute": "parts"}], ids=["plain", "compiled"])
def test_less_is_foreseen_to_be_held_at_once(toys: Toys, memory: dict[str, Any]) -> None:
    def workspace(**more: int) -> int:
        config = config_of("wan", toys("wan"), {"rank": 4}, {**memory, **more})
        model = make_model(config.model, config.objective)
        bucket = (frames_of(model), 24 * model.geometry.multiple, 24 * model.geometry.multiple)
        return Rehearsal(config, model, 0, CARDS[-1]).estimate(bucket, config.memory).moment.workspace

    assert workspace(**CHUNKED) < workspace()
