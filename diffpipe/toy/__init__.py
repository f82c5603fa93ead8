"""Data and models for a first run without any download: `toy:NAME` in a config becomes a folder, made on first use."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError

from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError
from diffpipe.models import MODELS

SCHEME = "toy:"
VERSION = 2  # raised when what is made changes


def materialize(config: Config, home: Path | None = None) -> Config:
    """The config with every `toy:NAME` replaced by a folder under ``home``, which is ``output_dir``/toy unless given.

    Raises:
        ConfigError: for a name that is not there.
    """
    home = home or config.output_dir / "toy"
    changes: dict[str, object] = {}
    if config.model.path is not None and config.model.path.startswith(SCHEME):
        path = _make(home, config.model.path, _models(), "model.path")
        changes["model"] = config.model.model_copy(update={"path": path})
    changes["data"] = config.data.model_copy(update={"folders": [_folder(f, home, "data.folders") for f in config.data.folders]})
    sets = [s.model_copy(update={"folders": [_folder(f, home, f"eval.sets.{s.name}") for f in s.folders]}) for s in config.eval.sets]
    changes["eval"] = config.eval.model_copy(update={"sets": sets})
    return config.model_copy(update=changes)


def _folder(folder, home: Path, key: str):
    changes: dict[str, object] = {}
    if folder.path.startswith(SCHEME):
        changes["path"] = _make(home, folder.path, _media(), key)
    if folder.controls is not None and str(folder.controls).startswith(SCHEME):
        changes["controls"] = Path(_make(home, str(folder.controls), _media(), f"{key}.controls"))
    return folder.model_copy(update=changes)


def _models() -> dict[str, Callable[[Path], None]]:
    return {family: lambda folder, family=family: _model(family, folder) for family in MODELS}


def _model(family: str, folder: Path) -> None:
    """Write a family's tiny checkpoint, the same weights every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        import_module(f"diffpipe.toy.models.{family.replace('-', '_')}").make(folder)


def _media() -> dict[str, Callable[[Path], None]]:
    from diffpipe.toy.media import make_clips, make_greys, make_pictures

    return {
        "pictures": lambda folder: make_pictures(folder, 48, 0),
        "pictures-heldout": lambda folder: make_pictures(folder, 12, 1),
        "greys": lambda folder: make_greys(folder, 48, 0),
        "greys-heldout": lambda folder: make_greys(folder, 12, 1),
        "clips": lambda folder: make_clips(folder, 12, 2),
        "clips-heldout": lambda folder: make_clips(folder, 3, 3),
    }


def _make(home: Path, name: str, makers: dict[str, Callable[[Path], None]], key: str) -> str:
    """The folder of a toy; made aside and renamed, so that several processes may ask at once."""
    plain = name.removeprefix(SCHEME)
    if plain not in makers:
        raise ConfigError(f"there is no {name!r}", where=key, expected=", ".join(SCHEME + n for n in makers))
    final = home / f"{plain}-v{VERSION}"
    if final.is_dir():
        return str(final)
    aside = home / f".{plain}-{uuid.uuid4().hex}"
    try:
        aside.mkdir(parents=True)
        makers[plain](aside)
        os.replace(aside, final)
    except (OSError, SafetensorError) as fault:
        # Another process may have been first: what it made is the same.
        if not final.is_dir():
            raise ConfigError(
                f"{name} cannot be made in {home}: {fault}", where="output_dir", fix="name a folder that can be written"
            ) from fault
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return str(final)
