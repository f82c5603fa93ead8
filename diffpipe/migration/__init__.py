"""A diffusion-pipe config, with the dataset configs that it names, becomes a config of ours."""

from __future__ import annotations

import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffpipe.config.load import validate
from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError
from diffpipe.migration.data import convert_data
from diffpipe.migration.draft import Draft, Fate, Table
from diffpipe.migration.model import convert_adapter, convert_model, find_family
from diffpipe.migration.optimizer import convert_optimizer
from diffpipe.migration.settings import CLIPS, Scale, convert_settings

WIDTH = 110


@dataclass(frozen=True)
class Converted:
    """A config of ours.

    Attributes:
        text: as a file has it, with what was left out as comments.
        fates: of every key of the old config, and of its dataset configs.
    """

    config: Config
    text: str
    fates: tuple[Fate, ...]


def convert(path: Path, scale: Scale) -> Converted:
    """What a diffusion-pipe config is here.

    Args:
        scale: what the file does not say.

    Raises:
        ConfigError: when a file is missing or no TOML, the model is not trained here, or a value is not what it must be.
    """
    old = Table(read_toml(path), "", str(path))
    family, model = find_family(old, str(path))
    train = Table(read_toml(find_dataset(path, old.text("dataset"), "dataset")), "dataset: ", old.text("dataset"))
    held_out = _held_out(path, old)
    controls = family.kind == "flux" and any(isinstance(d, dict) and "control_path" in d for d in train.entries("directory"))
    adapter = Table(old["adapter"], "adapter.", str(path)) if "adapter" in old else None
    if "optimizer" not in old:
        raise old.fault("optimizer", "an [optimizer] table with type and lr")
    draft = Draft()
    batch = convert_settings(draft, old, family, scale)
    convert_model(draft, model, family, full=adapter is None, controls=controls)
    if adapter is not None:
        convert_adapter(draft, adapter, family)
    clips = old.text("video_clip_mode", "single_beginning")
    if clips not in CLIPS:
        raise old.fault("video_clip_mode", ", ".join(CLIPS))
    if "video_clip_mode" in old:
        draft.tell(old, "video_clip_mode", "changed", "data.clips", f"{CLIPS[clips]} here")
    convert_data(draft, old, train, held_out, CLIPS[clips], takes_controls=controls)
    optimizer = Table(old["optimizer"], "optimizer.", str(path))
    convert_optimizer(
        draft, optimizer, batch=batch, dtype=model.text("dtype"), adapter=adapter, clip=old, forced="force_constant_lr" in old
    )
    draft.put("export.formats", ["comfyui" if adapter is None else family.format])
    for key, to in (("dataset", "data"), ("eval_datasets", "eval.sets")):
        if key in old:
            draft.tell(old, key, "carried", to, "what stands in it")
    for table in (model, optimizer, *([adapter] if adapter else [])):
        draft.finish(table)
    draft.finish(old, inner=("model", "adapter", "optimizer", "monitoring"))
    ordered = {name: draft.raw[name] for name in Config.model_fields if name in draft.raw}
    return Converted(validate(ordered, f"{path}, converted"), _written(path, ordered, draft.fates), tuple(draft.fates))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: when it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors put a mark in front
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), expected="a diffusion-pipe config (TOML)") from None
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError(f"not valid TOML: {fault}", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"cannot be read: {fault}", where=str(path), expected="a UTF-8 TOML file") from None


def find_dataset(config: Path, named: str, key: str) -> Path:
    """A file that a config names by its path from where diffusion-pipe was started: here, or in a folder that the config lies in.

    Raises:
        ConfigError: when it is nowhere.
    """
    places = [Path(named), *(folder / named for folder in config.absolute().parents)]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise ConfigError(
            f"{named} is not there",
            where=f"{config}: {key}",
            expected=f"a file, from the folder that this is run in or from {config.absolute().parent} upwards",
            fix="run this in the folder of diffusion-pipe, or write the whole path into the config",
        )
    return found


def _held_out(path: Path, old: Table) -> list[tuple[str, Table]]:
    """Names and dataset configs of the sets to evaluate."""
    found = []
    for number, entry in enumerate(old.entries("eval_datasets")):
        name, file = (f"eval{number}", entry) if isinstance(entry, str) else (None, None)
        if isinstance(entry, dict):
            name, file = entry.get("name"), entry.get("config")
        if not isinstance(name, str) or not isinstance(file, str):
            raise old.fault("eval_datasets", "files, or tables with name and config")
        found.append((name, Table(read_toml(find_dataset(path, file, "eval_datasets")), f"eval {name}: ", file)))
    return found


class _Writer(yaml.SafeDumper):
    """YAML whose short lists and sections stand in one line."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=None if len(str(mapping)) < WIDTH else False)


def _written(path: Path, raw: dict[str, Any], fates: list[Fate]) -> str:
    lines = [f"# Converted by `diffpipe convert` from {path.name}."]
    left = [fate for fate in fates if fate.outcome == "left out"]
    if left:
        lines.append("# Not carried over:")
    for fate in left:
        lines += textwrap.wrap(fate.line(), WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False)
    body = yaml.dump(raw, Dumper=_Writer, sort_keys=False, allow_unicode=True, default_flow_style=None, width=WIDTH)
    return "\n".join(lines) + "\n" + body
