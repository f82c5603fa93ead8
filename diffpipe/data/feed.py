"""Brings batches to the device while the one before is computed, and knows the place in the data of the one in use."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from diffpipe.data.loader import Batch, Loader


class Feed:
    """A loader's batches with their tensors on a device.

    ``fetch_ahead`` takes the next batch from the workers in a thread and, on CUDA, starts its copies on a stream of their own, so
    that a step waits for neither.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "feed")
        self._ahead: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._place = loader.state_dict()

    def __next__(self) -> Batch:
        batch, self._place = self._fetch() if self._ahead is None else self._ahead.result()
        self._ahead = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in tree_flatten(batch.microbatches)[0]:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)  # not to be reused before the step is done with it
        return batch

    def fetch_ahead(self) -> None:
        """Begin with the next batch."""
        if self._ahead is None:
            self._ahead = self._thread.submit(self._fetch)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch handed out."""
        return self._place

    def close(self) -> None:
        """End the loader's workers. They ignore the signal by which an interpreter that ends would end them, and wait for them."""
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None
        self._thread.shutdown()
        self._loader.close()

    def _fetch(self) -> tuple[Batch, dict[str, Any]]:
        batch = next(self._loader)
        place = self._loader.state_dict()
        if self._stream is None:
            return batch, place
        with torch.cuda.stream(self._stream):
            moved = tree_map(lambda x: x.to(self._device, non_blocking=True) if isinstance(x, Tensor) else x, batch.microbatches)
        return replace(batch, microbatches=moved), place
