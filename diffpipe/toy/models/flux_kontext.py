"""A FluxKontextPipeline of a few hundred thousand weights."""

from __future__ import annotations

from pathlib import Path

from diffpipe.toy.models import flux


def make(folder: Path) -> None:
    flux.make(folder, "FluxKontextPipeline")
