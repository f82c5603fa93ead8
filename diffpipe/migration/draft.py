"""An old config becomes a new one: its tables with their types checked, the new keys as they are set, and the fate of every old key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffpipe.errors import ConfigError


@dataclass(frozen=True)
class Fate:
    """What became of one old key.

    Attributes:
        key: as the old file has it, behind the name of its table.
        outcome: whether its value stands in the new config, stands there changed, or does not.
        to: the key here, where there is one.
        said: what its value means here; of a changed one the rule, of one left out the reason and what to do instead.
    """

    key: str
    outcome: Literal["carried", "changed", "left out"]
    to: str = ""
    said: str = ""

    def line(self) -> str:
        """In one line, for a person."""
        return self.key + (f" -> {self.to}" if self.to else "") + (f": {self.said}" if self.said else "")


class Table:
    """One table of an old config; its values are read with the type they must have.

    Args:
        values: by key.
        name: put before the keys where they are told of, such as ``adapter.``.
        file: for messages.
    """

    def __init__(self, values: Any, name: str, file: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"holds {values!r}", where=f"{file}: {name.strip('.: ')}", expected="a table")
        self.values: Mapping[str, Any] = values
        self.name, self.file = name, file

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def beside(self, more: Table) -> Table:
        """This table, with the values of ``more`` before its own."""
        return Table({**self.values, **more.values}, more.name, more.file)

    def fault(self, key: str, expected: str) -> ConfigError:
        """The fault of a value of another kind than it must be."""
        found = repr(self.values[key]) if key in self.values else "is missing"
        return ConfigError(found, where=f"{self.file}: {self.name}{key}", expected=expected)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; the default where there is none."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fault(key, "a number")
        return value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; the default where there is none."""
        value = self.number(key, default)
        if not value >= least or value % 1:
            raise self.fault(key, f"a whole number from {least} on")
        return int(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text; the default where there is none."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.fault(key, "a text")
        return value

    def flag(self, key: str) -> bool:
        """Whether it is there and true."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def entries(self, key: str) -> list[Any]:
        """A list; an empty one where there is none."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            raise self.fault(key, "a list")
        return value


class Draft:
    """The new config as it grows.

    Attributes:
        raw: its keys, as YAML would have them.
        fates: of the old keys that were dealt with.
    """

    def __init__(self) -> None:
        self.raw: dict[str, Any] = {}
        self.fates: list[Fate] = []

    def put(self, to: str, value: Any) -> None:
        """Set a key of the new config, which no old key alone decides."""
        *sections, last = to.split(".")
        place = self.raw
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value

    def carry(self, table: Table, key: str, to: str, said: str = "") -> None:
        """Set a key of the new config to an old key's value, where the old one is there."""
        if key in table:
            self.put(to, table[key])
            self.tell(table, key, "carried", to, said)

    def change(self, table: Table, key: str, to: str, value: Any, said: str) -> None:
        """Set a key of the new config to what an old key's value becomes, where the old one is there."""
        if key in table:
            self.put(to, value)
            self.tell(table, key, "changed", to, said)

    def leave(self, table: Table, key: str, said: str) -> None:
        """Tell why an old key is not carried over, and what to do instead, where it is there."""
        if key in table:
            self.tell(table, key, "left out", "", said)

    def tell(self, table: Table, key: str, outcome: Literal["carried", "changed", "left out"], to: str, said: str) -> None:
        """Note an old key's fate."""
        self.fates.append(Fate(table.name + key, outcome, to, said))

    def told(self, table: Table, key: str) -> bool:
        """Whether an old key has its fate."""
        return any(fate.key == table.name + key for fate in self.fates)

    def finish(self, table: Table, inner: Collection[str] = ()) -> None:
        """Leave out the keys of a table that no rule knows.

        Args:
            inner: the tables in it that have fates of their own.
        """
        for key in table:
            if key not in inner and not self.told(table, key):
                self.leave(table, key, "diffusion-pipe has no such key, and does not tell; take it out, or look for a misspelling")
