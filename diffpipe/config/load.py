"""One config from a YAML file and `--set` overrides, with every fault in one report."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML that reports a key written twice, and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in ``path`` with each ``key.path=value`` of ``overrides`` put in.

    Raises:
        ConfigError: with every fault: unknown keys (and what was probably meant), wrong types and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as fault:
        raise ConfigError("no such file", where=str(path), fix="name a config; configs/quickstart.yaml runs as it is") from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"cannot be read: {fault}", where=str(path), expected="a UTF-8 YAML file") from fault
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"holds {type(raw).__name__}, not keys and values", where=str(path), expected="YAML such as `run: {steps: 100}`")
    for override in overrides:
        _put(raw, override)
    return validate(raw, str(path))


def validate(raw: dict[str, Any], where: str) -> Config:
    """The config that ``raw`` says.

    Raises:
        ConfigError: with every fault.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as faults:
        lines = [_explain(fault) for fault in faults.errors()]
        count = f"{len(lines)} faults" if len(lines) > 1 else "1 fault"
        raise ConfigError(
            f"{count}\n" + "\n".join(f"  {line}" for line in lines), where=where, fix="see configs/reference.yaml for every key"
        ) from None


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key under which two configs, as JSON, do not hold the same, with dots; and what each holds there, None for nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *(n for n in other if n not in one)]:
            yield from differences(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
    elif one != other:
        yield key, one, other


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"not valid YAML: {getattr(fault, 'problem', None) or fault}", where=where + line) from fault


def _put(raw: dict[str, Any], override: str) -> None:
    key, found, value = override.partition("=")
    if not found or not key:
        raise ConfigError(f"{override!r} has no value", where="--set", expected="key=value, such as --set optimizer.lr=1e-4")
    *path, last = key.split(".")
    place: Any = raw
    for name in path:
        if isinstance(place, list):
            place = place[_index(place, name, key)]
            continue
        if not isinstance(place.get(name), dict | list):
            place[name] = {}
        place = place[name]
    if isinstance(place, list):
        place[_index(place, last, key)] = _parse(value, f"--set {key}")
    else:
        place[last] = _parse(value, f"--set {key}")


def _index(place: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(place):
        raise ConfigError(
            f"{key}: {name!r} is no place in a list of {len(place)}", where="--set", expected=f"a number from 0 to {len(place) - 1}"
        )
    return int(name)


def _explain(fault: Any) -> str:
    key = ".".join(str(p) for p in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: there is no such key{_did_you_mean(fault['loc'])}"
    if fault["type"] == "missing":
        return f"{key}: is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(fault.get("input"), dict | list) or fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {fault['input']!r} found, {message[0].lower()}{message[1:]}"


def _did_you_mean(loc: tuple[str | int, ...]) -> str:
    wrong = str(loc[-1])
    section = _section(loc[:-1])
    near = difflib.get_close_matches(wrong, list(section.model_fields), 1, 0.5) if section else []
    if near:
        return f"; did you mean {near[0]}?"
    elsewhere = [key for key in all_keys(Config) if key.rsplit(".", 1)[-1] == wrong]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; the keys here are {', '.join(section.model_fields)}" if section else ""


def _section(loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Config
    for name in loc:
        if isinstance(name, int) or section is None:
            continue
        field = section.model_fields.get(name)
        section = next(_models_in(field.annotation), None) if field else None
    return section


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section and of those inside it, with dots."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from all_keys(inner, f"{prefix}{name}.")
