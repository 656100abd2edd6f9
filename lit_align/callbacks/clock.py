"""A clock that stands still while a run does something else than train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

Counters = dict[str, float]


class Clock:
    """Seconds of training, those spent waiting for the loader, and counters of others that grow along with them.

    Args:
        counters: Gives numbers that only grow; what they grow by during a pause is left out.
        before_pause: Called when a pause begins: what the device still has to do belongs to training.
    """

    def __init__(self, counters: Callable[[], Mapping[str, float]], before_pause: Callable[[], None]) -> None:
        self.waited = 0.0
        self._counters, self._before_pause = counters, before_pause
        self._paused, self._left_out = 0.0, Counters()
        self._depth, self._fetching_since = 0, 0.0
        self._wrapped: list[tuple[Any, str, Any]] = []

    def now(self) -> Counters:
        """`seconds` since some moment, `waited`, and the counters, all without what happened in pauses."""
        counters = {name: value - self._left_out.get(name, 0.0) for name, value in self._counters().items()}
        return {"seconds": time.perf_counter() - self._paused, "waited": self.waited, **counters}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """While open, the clock stands still; it may be opened inside itself."""
        self._depth += 1
        if self._depth > 1:
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._before_pause()
        started, counters = time.perf_counter(), dict(self._counters())
        try:
            yield
        finally:
            self._depth = 0
            self._paused += time.perf_counter() - started
            for name, value in self._counters().items():
                grown = value - counters.get(name, 0.0)
                self._left_out[name] = self._left_out.get(name, 0.0) + grown

    def pause_during(self, owner: Any, method: str) -> None:
        """Lets every call of an object's method be a pause, until `release`."""
        call = getattr(owner, method)

        @wraps(call)
        def paused(*args: Any, **kwargs: Any) -> Any:
            with self.pause():
                return call(*args, **kwargs)

        self._replace(owner, method, paused)

    def wait_between(self, owner: Any, before: str, after: str) -> None:
        """Counts the time from a call of one method to the next call of another as waiting, until `release`."""
        begin, end = getattr(owner, before), getattr(owner, after)

        def begins() -> None:
            begin()
            self._fetching_since = time.perf_counter()

        def ends() -> None:
            self.waited += time.perf_counter() - self._fetching_since
            end()

        self._replace(owner, before, begins)
        self._replace(owner, after, ends)

    def release(self) -> None:
        """Puts every method back."""
        while self._wrapped:
            owner, method, before = self._wrapped.pop()
            if before is None:
                delattr(owner, method)
            else:
                setattr(owner, method, before)

    def _replace(self, owner: Any, method: str, call: Callable[..., Any]) -> None:
        self._wrapped.append((owner, method, vars(owner).get(method)))
        setattr(owner, method, call)
