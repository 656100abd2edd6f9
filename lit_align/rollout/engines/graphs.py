"""CUDA graphs of the decode step: one launch instead of hundreds, which is what small models wait for."""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger

import torch
from torch import Tensor

from lit_align.rollout.engines.slots import Slots

log = getLogger(__name__)

Step = Callable[[], tuple[Tensor, Tensor]]
Capture = Callable[[Step], Step]


def captured(step: Step) -> Step:
    """Captures a step, which must have run before, and gives what replays it; its results lie where they always lie."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


def bucket(rows: int, most: int) -> int:
    """How many rows a graph is captured for: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., at most `most`."""
    power = 1 << (rows - 1).bit_length()
    return min(power // 4 * 3 if power >= 4 and rows <= power // 4 * 3 else power, most)


class GraphedStep:
    """The step for as many rows as are alive, rounded up; each such number is captured when it comes up again.

    The step works in place on the slots and on the weights, so a graph holds for the whole rollout. Where something in
    the model cannot be captured, the rollout goes on without graphs, and says so.

    Args:
        step: One decode step of the window's rows.
        slots: Whose window it reads.
        capture: Makes a replay of a step.
    """

    def __init__(self, step: Step, slots: Slots, capture: Capture = captured) -> None:
        self.step, self.slots, self.capture = step, slots, capture
        self.replays: dict[int, Step | None] = {}
        slots.window.index = slots.column_index

    def __call__(self) -> tuple[Tensor, Tensor]:
        """One step; token and log-probability of each row, [rows]."""
        window = self.slots.window
        window.rows = bucket(self.slots.live, self.slots.slots)
        if window.rows not in self.replays:
            self.replays[window.rows] = None  # the first time it runs as it is, which warms everything up
            return self.step()
        if self.replays[window.rows] is None:
            self.replays[window.rows] = self._captured()
        token, logps = self.replays[window.rows]()
        return token.clone(), logps.clone()

    def _captured(self) -> Step:
        try:
            return self.capture(self.step)
        except RuntimeError as error:
            log.warning("no CUDA graph of the decode step, it runs without: %s", str(error).splitlines()[0])
            self.capture = _as_it_is
            return self.step


def _as_it_is(step: Step) -> Step:
    return step
