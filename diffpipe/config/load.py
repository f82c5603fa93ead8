"""One config from a YAML file and `--set` overrides, with every fault in one report."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError

# What people run into, by what the YAML reader says of it.
CURES = {
    "escape": "write / for \\, or single quotes for double ones, in which \\ begins an escape",
    "'\\t'": "indent with spaces",
}


class _Loader(yaml.SafeLoader):
    """YAML that reports a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys those beside it may replace
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no name for a key", key_node.start_mark)
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
        held = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"holds {held}, not keys and values", where=str(path), expected="YAML such as `run: {steps: 100}`")
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
        lines = _explained([(_without_kinds(fault["loc"]), fault) for fault in faults.errors()])
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
        problem = str(getattr(fault, "problem", None) or fault)
        fix = next((cure for sign, cure in CURES.items() if sign in problem), "")
        raise ConfigError(f"not valid YAML: {problem}", where=where + line, fix=fix) from fault


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


def _without_kinds(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Names and places alone: behind a key whose value may be of several kinds pydantic says which of them was tried."""
    for i in range(1, len(loc)):
        holder = _section(loc[: i - 1])
        field = holder.model_fields.get(str(loc[i - 1])) if holder else None
        if field and get_origin(field.annotation) in (Union, UnionType) and len(set(get_args(field.annotation)) - {NoneType}) > 1:
            return loc[:i] + loc[i + 1 :]
    return loc


def _explained(faults: list[tuple[tuple[str | int, ...], Any]]) -> list[str]:
    """A line for each key at fault; one that may be of several kinds has a fault for each, of which those that lie deepest say most."""
    by_key: dict[tuple[str | int, ...], list[Any]] = {}
    for loc, fault in faults:
        if not any(deeper[: len(loc)] == loc != deeper for deeper, _ in faults):
            by_key.setdefault(loc, []).append(fault)
    return [_explain(loc, found) for loc, found in by_key.items()]


def _explain(loc: tuple[str | int, ...], faults: list[Any]) -> str:
    key = ".".join(str(p) for p in loc)
    fault = next((f for f in faults if f["type"] == "value_error"), faults[0])
    kind, given = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        return f"{key}: there is no such key{_did_you_mean(loc)}"
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if kind == "model_type" and given is None:
        return f"{key}: nothing found, keys below it expected; take it out where all have their defaults"
    messages = ["Input should be keys and values" if f["type"] == "model_type" else f["msg"] for f in faults]
    message = "; or ".join([messages[0], *(m.removeprefix("Input should be ") for m in messages[1:])])
    return f"{key}: {message}" if isinstance(given, dict | list) else f"{key}: {given!r} found, {message[0].lower()}{message[1:]}"


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
