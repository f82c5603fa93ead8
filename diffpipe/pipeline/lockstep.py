"""Lets several forward passes go through a model together: all pass a unit before any goes on to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor


class Lockstep:
    """Runs calls by turns in one thread; each gives its turn away where it meets a unit.

    So a streamed unit is brought once for all microbatches. Since there is one thread, autograd's nodes are numbered in the order
    of the work, and one backward pass from all results takes that order back: unit by unit, and in each unit microbatch by microbatch.
    """

    def run(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The calls' results, in their order."""
        results: dict[int, Tensor] = {}

        def body(number: int) -> None:
            results[number] = calls[number]()

        waiting = deque(greenlet(partial(body, number)) for number in range(len(calls)))
        for call in waiting:
            call.gr_context = copy_context()  # what is set around this is set in there
        while waiting:
            call = waiting.popleft()
            call.switch()
            if not call.dead:
                waiting.append(call)
        return [results[number] for number in range(len(calls))]

    def stopping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` that lets the other calls come this far first."""

        def stopped(*args: Any, **kwargs: Any) -> Any:
            runner = getcurrent().parent
            if runner is not None:
                runner.switch()
            return forward(*args, **kwargs)

        return stopped
