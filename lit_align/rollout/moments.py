"""Running mean and variance of all scores of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass
class RunningMoments:
    """Mean and variance of everything seen so far, merged batch by batch (Chan, Golub and LeVeque 1979, eq. 2.1).

    Three plain floats are its whole state: they go into the checkpoint.

    Attributes:
        count: Numbers seen.
        mean: Their mean.
        squares: Sum of their squared distances from the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Adds numbers, any shape, at least one."""
        values = values.double()
        count, mean = float(values.numel()), float(values.mean())
        squares, total = float((values - mean).square().sum()), self.count + float(values.numel())
        self.squares += squares + (mean - self.mean) ** 2 * self.count * count / total
        self.mean += (mean - self.mean) * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of the population; 1 until the numbers differ."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0

    def scaled(self, values: Tensor) -> Tensor:
        """Counts the numbers in, then divides them by the standard deviation; their mean is not taken off."""
        self.update(values)
        return values / self.std

    def as_dict(self) -> dict[str, float]:
        """The state."""
        return asdict(self)
