"""From hidden states to log-probabilities of given tokens, and from there to the loss, without [tokens, vocabulary].

Two ways through the same projection. `head_loss` is for losses that are a sum over parts of the micro-batch: it goes
part by part, asks the loss for its derivative at once, and so needs three matrix products for a part's logits and
gradients. `head_stats` is for everything else: the logits of a part are computed again in the backward pass, which
makes four. Both keep a bounded number of logits, whatever the micro-batch and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lit_align.batch import MicroBatch
from lit_align.models.logits import plain_stats
from lit_align.models.projection import Gradients, Projection, chunk_rows, plain_projection, score


class TokenStats(NamedTuple):
    """What the head says of each scored token; N rows, float32.

    Attributes:
        logps: log p(target), in nats; differentiable.
        entropy: Entropy of the whole distribution, in nats; differentiable if that was asked for.
        correct: 1.0 where the target is the most probable token, else 0.0; no gradient.
    """

    logps: Tensor
    entropy: Tensor
    correct: Tensor


LossOfPart = Callable[[TokenStats, MicroBatch], Tensor]
"""The loss of a part of a micro-batch, a scalar; it may depend on the trained weights through the stats alone."""
Parts = Sequence[tuple[slice, MicroBatch]]
"""Which rows of the scored tokens a part holds, and the part; see `lit_align.batch.parts`."""


def head_loss(
    model: PreTrainedModel,
    hidden: Tensor,
    parts: Parts,
    loss_of: LossOfPart,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> Tensor:
    """Sum of a loss over parts of the micro-batch, with its gradient taken part by part.

    Args:
        model: The causal language model whose head is used: its weight, bias, scale and soft-cap.
        hidden: Hidden states that predict the scored tokens, [N, H].
        parts: Cover the N rows.
        loss_of: Called once with each part, with gradients on or, if they are off around this call, without.
        temperature: Divides the logits; the same as in sampling.
        entropy_gradient: Whether the loss depends on the entropy too.

    Returns:
        Scalar; differentiable once.
    """
    head = plain_projection(model, temperature)
    if head is None:
        arguments = (temperature, entropy_gradient)
        if not parts:  # a zero that still reaches every weight
            return plain_stats(model, hidden, hidden.new_zeros(len(hidden), dtype=torch.long), *arguments)[0].sum()
        stats = [TokenStats(*plain_stats(model, hidden[rows], p.scored.targets, *arguments)) for rows, p in parts]
        return _added([loss_of(s, part) for s, (_, part) in zip(stats, parts, strict=True)], hidden)
    head = head.for_a_walk()
    if torch.is_grad_enabled():
        return _PartwiseLoss.apply(hidden, head.weight, head.bias, head, parts, loss_of, entropy_gradient)
    with torch.autocast(hidden.device.type, enabled=False):
        scored = [(score(hidden[rows], part.scored.targets, head), part) for rows, part in parts]
        losses = [loss_of(_stats(chunk), part) for chunk, part in scored]
    return _added(losses, hidden)


def _added(losses: list[Tensor], like: Tensor) -> Tensor:
    return sum(losses, start=like.new_zeros((), dtype=torch.float32))


def head_stats(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    rows: int | None = None,
) -> TokenStats:
    """Scores `targets` under softmax(logits / temperature), for any loss.

    Args:
        model: The causal language model whose head is used: its weight, bias, scale and soft-cap.
        hidden: Hidden states that predict the targets, [N, H].
        targets: Token ids, int64 [N].
        temperature: Divides the logits; the same as in sampling.
        entropy_gradient: Whether the entropy is differentiable too.
        rows: Rows of logits computed at a time; None = what suits the device.

    Returns:
        One row per target.
    """
    rows = rows or chunk_rows(model.get_output_embeddings().weight.shape[0], hidden.device)
    head = plain_projection(model, temperature)
    if head is None:
        pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
        chunks = [plain_stats(model, h, t, temperature, entropy_gradient) for h, t in pieces]
        return TokenStats(*(torch.cat(column) for column in zip(*chunks, strict=True)))
    return TokenStats(*_Stats.apply(hidden, head.weight, head.bias, targets, head, rows, entropy_gradient))


@torch.no_grad()
def head_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities alone, without gradients: float32 [N]; see `head_stats`."""
    head = plain_projection(model, temperature)
    if head is None:
        return head_stats(model, hidden, targets, temperature).logps
    rows = chunk_rows(len(head.weight), hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head, pieces = head.for_a_walk(), zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([score(h, t, head, moments=False).logps for h, t in pieces])


def _stats(chunk: Any) -> TokenStats:
    return TokenStats(chunk.logps, chunk.entropy, chunk.correct)


class _PartwiseLoss(torch.autograd.Function):
    """Loss and gradient in one walk; the loss's derivative of a part is asked for while its logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Projection,
        parts: Parts,
        loss_of: LossOfPart,
        entropy_gradient: bool,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=head.exact)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients, of_hidden = Gradients(head), torch.zeros_like(hidden)
            for rows, part in parts:
                chunk = score(hidden[rows], part.scored.targets, head, keep=True)
                loss, of_logps, of_entropy = _derivatives(loss_of, _stats(chunk), part, entropy_gradient)
                of_hidden[rows] = gradients.add(chunk, of_logps, of_entropy).to(hidden.dtype)
                total = total + loss
        ctx.save_for_backward(of_hidden, gradients.weight, gradients.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_total: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the weights' gradient may be gigabytes.
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        scaled = [None if g is None else g.mul_(of_total[0]) for g in (of_hidden, of_weight, of_bias)]
        narrow = [None if g is None else g.to(d) for g, d in zip(scaled[1:], ctx.dtypes, strict=True)]
        return scaled[0], *narrow, None, None, None, None


def _derivatives(
    loss_of: LossOfPart, stats: TokenStats, part: MicroBatch, entropy_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of a part, and its derivative by each log-probability and, if asked for, by each entropy."""
    stats.logps.requires_grad_()
    inputs = [stats.logps]
    if entropy_gradient:
        inputs.append(stats.entropy.requires_grad_())
    with torch.enable_grad():
        loss = loss_of(stats, part)
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), found[0], found[1] if entropy_gradient else None


class _Stats(torch.autograd.Function):
    """Log-probabilities whose logits are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Projection,
        rows: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            walked, pieces = head.for_a_walk(), zip(hidden.split(rows), targets.split(rows), strict=True)
            chunks = [_stats(score(h, t, walked)) for h, t in pieces]
        logps, entropy, correct = (torch.cat(column) for column in zip(*chunks, strict=True))
        ctx.save_for_backward(hidden, targets)
        ctx.head, ctx.rows, ctx.entropy_gradient = head, rows, entropy_gradient
        ctx.mark_non_differentiable(correct, *(() if entropy_gradient else (entropy,)))
        return logps, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_stats: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        head: Projection = ctx.head.for_a_walk()
        with torch.autocast(hidden.device.type, enabled=False):
            gradients, of_hidden = Gradients(head), []
            of_entropy = of_stats[1].split(ctx.rows) if ctx.entropy_gradient else repeat(None)
            pieces = zip(hidden.split(ctx.rows), targets.split(ctx.rows), of_stats[0].split(ctx.rows), strict=True)
            for (h, t, of_logps), of_e in zip(pieces, of_entropy, strict=False):
                chunk = score(h, t, head, keep=True, moments=ctx.entropy_gradient)
                of_hidden.append(gradients.add(chunk, of_logps, of_e).to(hidden.dtype))
        wide = zip((gradients.weight, gradients.bias), (head.weight, head.bias), strict=True)
        narrow = [None if g is None else g.to(like.dtype) for g, like in wide]
        return torch.cat(of_hidden), *narrow, None, None, None, None
