"""Brings batches to the device while the one before is computed, and knows the place in the data of the one in use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from diffpipe.data.loader import Batch, Loader


class Feed:
    """A loader's batches with their tensors on a device.

    On CUDA, ``fetch_ahead`` starts the copies of the next batch on a stream of their own; elsewhere nothing is moved.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Batch, dict[str, Any]] | None = None
        self._place = loader.state_dict()

    def __next__(self) -> Batch:
        batch, self._place = self._ahead or self._fetch()
        self._ahead = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in tree_flatten(batch.microbatches)[0]:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)  # not to be reused before the step is done with it
        return batch

    def fetch_ahead(self) -> None:
        """Take the next batch from the workers and start to copy it; called once a step's work is on its way."""
        if self._stream is not None and self._ahead is None:
            self._ahead = self._fetch()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch handed out."""
        return self._place

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on after the batch at which ``state`` was taken; gives what a person should know when that was not possible."""
        self._ahead = None
        note = self._loader.load_state_dict(state)
        self._place = self._loader.state_dict()
        return note

    def _fetch(self) -> tuple[Batch, dict[str, Any]]:
        batch = next(self._loader)
        place = self._loader.state_dict()
        if self._stream is None:
            return batch, place
        with torch.cuda.stream(self._stream):
            moved = tree_map(lambda x: x.to(self._device, non_blocking=True) if isinstance(x, Tensor) else x, batch.microbatches)
        return replace(batch, microbatches=moved), place
