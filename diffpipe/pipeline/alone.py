"""The store of a process that is the whole world."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistStoreError, Store


class OwnStore(Store):
    """Keeps what a process group would tell other processes.

    torch's own store within a process is not made for Windows; one in a file would lie where names may not be ASCII, and one behind a port
    makes its firewall ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._held[key] = value

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._held[key]

    def add(self, key: str, value: int) -> int:
        count = int(self._held.get(key, b"0")) + value
        self._held[key] = str(count).encode()
        return count

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._held for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        if not self.check(keys):  # nobody else will ever set it
            raise DistStoreError(f"nothing is held under {', '.join(keys)}")
