"""Which software a run runs on, as far as its numbers depend on it."""

from __future__ import annotations

import platform
from importlib.metadata import version

from diffpipe import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def versions() -> dict[str, str]:
    """Versions by name."""
    return {"diffpipe": __version__, "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
