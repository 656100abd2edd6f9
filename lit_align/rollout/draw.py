"""Drawing tokens by inverting the distribution function at given uniform numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 256
"""Vocabulary entries that are summed up together before the distribution function is looked at more closely."""
CACHED = 2**19
"""So many logits are worked on at a time on a CPU: what does not fit its cache, or is allocated anew, is slow there."""


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token a row from softmax(logits / temperature): the first whose distribution function exceeds u.

    Probabilities are summed in the uniform numbers' dtype, float64 where the device has it. The sum over the vocabulary
    is taken in blocks, so that only the sums of the blocks and one block a row are ever that wide. A row's result
    depends on the row alone, not on the rows beside it.

    Args:
        logits: float32 [R, V]; left as they are.
        temperature: Divides them; 0 = the most probable token.
        uniform: Numbers in [0, 1), [R]; not looked at where the temperature is 0.

    Returns:
        The tokens, int64 [R], and their log-probabilities in nats, float32 [R] (0 where the temperature is 0). A token
        of probability 0 is never drawn.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    rows = max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    with _running_sums():
        parts = [_draw(z, temperature, u) for z, u in zip(logits.split(rows), uniform.split(rows), strict=True)]
    return torch.cat([token for token, _ in parts]), torch.cat([logps for _, logps in parts])


def precise(device: torch.device) -> torch.dtype:
    """The widest dtype in which the device sums: float64, except on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def _running_sums() -> Iterator[None]:
    """While open, torch takes running sums on a GPU under `trainer.deterministic: true` too.

    It refuses all of them, for those of one long row may differ; here a row is a few hundred numbers, in one go.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    shifted = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        shifted /= temperature
    blocks = _blocks(shifted.exp())  # [R, blocks, BLOCK], not normalised
    bounds = blocks.sum(-1, dtype=uniform.dtype).cumsum(-1)
    total = bounds[:, -1:]
    # u * total may round up to the total, beyond which there is nothing.
    goal = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # To the right: what has probability 0 has no room between its bounds, so it is never drawn.
    block = torch.searchsorted(bounds, goal, right=True).clamp(max=bounds.shape[-1] - 1)  # beyond: NaN
    weights = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0]
    before = torch.where(block > 0, bounds.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = torch.searchsorted(before + weights.cumsum(-1, dtype=uniform.dtype), goal, right=True)
    # The block's own sum and its running sum may differ in the last bit: then u lies in its last possible token.
    possible = torch.where(weights > 0, torch.arange(BLOCK, device=logits.device), 0).amax(-1, keepdim=True)
    token = block * BLOCK + torch.minimum(inside, possible)
    logps = shifted.gather(1, token).to(total.dtype) - total.log()
    return token[:, 0], logps[:, 0].float()


def _blocks(weights: Tensor) -> Tensor:
    rows, size = weights.shape
    if rest := -size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, rest))
    return weights.view(rows, -1, BLOCK)
