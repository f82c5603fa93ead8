"""What a pipeline is made of and where each component lies: a diffusers folder, a repository of the hub, or single files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffpipe.config.schema import ModelConfig
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.models.weights import file_in, read_json

CONFIGS = Path(__file__).with_name("configs")
HUB = "hf:"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Component:
    """One component of a pipeline.

    Attributes:
        name: diffusers' name of it, such as ``text_encoder``.
        library, kind: the module and the class that make it.
        config: what its class is made from, where no folder says.
        folder: holds its config, and its weights or tokenizer files.
        file: a checkpoint file that its weights are taken from instead.
    """

    name: str
    library: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    file: Path | None = None

    @property
    def origin(self) -> str:
        return str(self.file or self.folder or f"the component {self.name}")


Blueprint = dict[str, Component]


def read_blueprint(config: ModelConfig, pipeline: str, denoiser: str) -> Blueprint:
    """The components that ``model.path`` and ``model.files`` name, without those that the pipeline can do without.

    Args:
        pipeline: name of the diffusers pipeline class.
        denoiser: name of the denoiser's component and its class, as ``transformer:FluxTransformer2DModel``.

    Raises:
        CheckpointError: when a folder is no pipeline of this family.
        ConfigError: when ``model.files`` names a component that the pipeline does not have, or the hub is asked without a revision.
    """
    component, _, kind = denoiser.partition(":")
    place = _place(config)
    if place is None or place.is_file():
        found = {n: replace(p, file=place) for n, p in shipped(config.family).items()}
    else:
        found = dict(_in_folder(place, component, kind))
    for name, path in config.files.items():
        if name not in found:
            near = difflib.get_close_matches(name, found, 1, 0.4)
            raise ConfigError(
                f"there is no component {name!r} in a {pipeline}{f'; did you mean {near[0]}?' if near else ''}",
                where="model.files",
                expected=", ".join(sorted(found)),
            )
        if not path.exists():
            raise ConfigError("no such file or folder", where=f"model.files.{name}: {path}")
        if path.is_file() and "tokenizer" in name:
            path = path.parent  # tokenizer.json and spiece.model are read by their folder
        if path.is_dir() and name == component:
            if (held := _config_in(path)).get("_class_name") == kind:
                found[name] = replace(found[name], config=held)
            else:
                path = file_in(path) or path  # an original release, whose weights have other names
        found[name] = replace(found[name], file=None, folder=path) if path.is_dir() else replace(found[name], file=path)
    return found


@cache
def shipped(family: str) -> Blueprint:
    """The components of a family's released pipeline, with the configs that come with diffpipe."""
    file = CONFIGS / f"{family}.json"
    if not file.is_file():
        raise ConfigError(
            f"no configs of {family} come with diffpipe",
            where="model.path",
            fix="name the model's diffusers folder, also beside model.files",
        )
    components: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {name: Component(name, library, kind, config) for name, (library, kind, config) in components.items()}


def _place(config: ModelConfig) -> Path | None:
    if config.path is None:
        return None
    if config.path.startswith(HUB):
        return _download(config)
    place = Path(config.path)
    if not place.exists():
        raise CheckpointError(
            f"{place}: no such folder",
            where="model.path",
            expected="a diffusers folder, a checkpoint file, or hf:OWNER/NAME@REVISION",
            fix="download the model's diffusers repository and name its folder; single files go to model.files; `diffpipe plan` takes null",
        )
    return place


def _in_folder(folder: Path, component: str, kind: str) -> Iterator[tuple[str, Component]]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: a folder without model_index.json",
            where="model.path",
            expected=f"a model in the diffusers folder format (model_index.json, {component}/, vae/, text_encoder/ ...)",
            fix="download the model's diffusers repository and name its folder; single files go to model.files",
        )
    entries = read_json(index)
    found = _config_in(folder / component).get("_class_name")
    if found != kind:
        raise CheckpointError(
            f"{folder} holds {found or f'no {component}/config.json'}",
            where="model.path",
            expected=f"{component}/config.json of a {kind}",
            fix="change model.path or model.family",
        )
    for name, entry in entries.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            yield name, Component(name, entry[0], entry[1], _config_in(folder / name), folder / name)


def _config_in(folder: Path) -> dict[str, Any]:
    """What a component's folder says that it is made from."""
    config = folder / "config.json"
    return read_json(config) if config.is_file() else {}


def _download(config: ModelConfig) -> Path:
    """The folder that a repository of the hub was downloaded to, without weights that ``model.files`` gives."""
    assert config.path is not None
    name, _, revision = config.path.removeprefix(HUB).partition("@")
    if not revision or name.count("/") != 1:
        raise ConfigError(
            f"{config.path!r} names no revision" if not revision else f"{config.path!r} is no repository",
            where="model.path",
            expected="hf:OWNER/NAME@REVISION, the revision being a commit of the repository",
            fix="open the repository's history on the hub and copy the commit, so that the run can be repeated",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    given = [f"{component}/*{suffix}*" for component in config.files for suffix in WEIGHTS]
    unused = ["*.md", "*.png", "*.jpg", "*.gif", "*.mp4", "*.msgpack", "*.onnx*", "*.fp16.*", "*.bf16.*", "*.ckpt", "/*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*/*"], ignore_patterns=[*given, *unused]))
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as fault:
        said = " ".join(str(fault).split())[:200] or type(fault).__name__
        raise CheckpointError(
            f"{name} at {revision} cannot be downloaded: {said}",
            where="model.path",
            fix="check the name, the revision and the network; a gated model needs HF_TOKEN in the environment",
        ) from fault
