"""The vocabulary projection in blocks: log-probabilities of given tokens, and their gradient, without logits at rest.

With y = cap * tanh(s (W h + b) / cap) / temperature (without a cap: y = s (W h + b) / temperature) and p = softmax(y)

    log p_t       = y_t - logsumexp(y)              d log p_t / d y_j = [j = t] - p_j
    entropy       = logsumexp(y) - sum_j p_j y_j    d entropy / d y_j = -p_j (log p_j + entropy)

The vocabulary is walked in blocks that stay in the processor's cache, with a running maximum and sum (online softmax,
arXiv:1805.02867, algorithm 3). A chunk of rows keeps exp(y - maximum so far), from which the gradient is two matrix
products a block: what turns it into p times the loss's gradient is one factor per row, so it is multiplied onto the
products' thin sides, never onto [rows, V]. All sums are in float32 at least, whatever the weights are: bfloat16
log-probabilities are too coarse for KL divergences and ratios.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.models.layers import is_plain_linear

BLOCK = 2048
"""Entries of the vocabulary at a time on a CPU: a block of a few hundred rows then stays in its cache."""
KEPT = {"cpu": 2**24, "cuda": 2**28}
"""Exponentials kept at a time (64 MiB on a CPU, 1 GiB on a GPU): they set the rows of a chunk."""
ROWS = {"cpu": (128, 1024), "cuda": (512, 4096)}
"""Fewest and most rows of a chunk: with fewer, reading the weights costs more than multiplying them."""
HANDFUL = 16
"""Rows up to which a CPU is faster with the product turned round (measured with 49k and 1.5k rows of weights)."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of [rows, vocabulary] that are worked on at a time."""
    kind = device.type if device.type in KEPT else "cuda"
    least, most = ROWS[kind]
    return min(max(KEPT[kind] // vocabulary, least), most)


@dataclass(frozen=True)
class Projection:
    """What a language model does between its last hidden state and its distribution.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: Multiplies W h + b (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        cap: Soft-cap of the scaled logits (Gemma 2); None = none.
        temperature: Divides what comes out.
        operands: Dtype of the matrix products' operands; their sums are float32 at least.
        converted: `weight` in that dtype, [V, H], for the time of one walk; None = each block is converted when used.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None
    temperature: float
    operands: torch.dtype
    converted: Tensor | None = None

    @property
    def exact(self) -> torch.dtype:
        """Dtype of everything but the operands: float32, or float64 for float64 weights."""
        return torch.promote_types(self.operands, torch.float32)

    @property
    def inner(self) -> float:
        """The factor that is multiplied onto the hidden states; without a cap the temperature is part of it."""
        return self.scale if self.cap is not None else self.scale / self.temperature

    def blocks(self) -> Iterator[slice]:
        """The vocabulary in blocks."""
        vocabulary = len(self.weight)
        size = BLOCK if self.weight.device.type == "cpu" else vocabulary
        return (slice(i, min(i + size, vocabulary)) for i in range(0, vocabulary, size))

    def for_a_walk(self) -> Projection:
        """With the weights converted once for all chunks, where one block is all of them; else as it is."""
        if self.weight.dtype == self.operands or len(list(self.blocks())) > 1:
            return self
        return replace(self, converted=self.weight.detach().to(self.operands))

    def operand(self, block: slice) -> Tensor:
        """The weights of a block as the products take them, [block, H]."""
        return (self.weight if self.converted is None else self.converted)[block].to(self.operands)

    def logits(self, scaled: Tensor, block: slice) -> Tensor:
        """Logits y of a block [rows, block], from `inner` times the hidden states."""
        y = _tall(self.operand(block), scaled.to(self.operands))
        if self.bias is not None:
            y += self.bias[block].to(y.dtype) * self.inner
        if self.cap is not None:
            y = torch.tanh(y / self.cap) * (self.cap / self.temperature)
        return y


def plain_projection(model: PreTrainedModel, temperature: float) -> Projection | None:
    """The model's projection; None where its head is more than a matrix and a bias (adapters on it, quantised)."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not is_plain_linear(head):
        return None
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return Projection(
        weight=head.weight,
        bias=head.bias,
        scale=(1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
        cap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
        operands=_operands(head.weight),
    )


def _operands(weight: Tensor) -> torch.dtype:
    """Half precision only where the device adds up its products in float32: on a GPU, as weights or autocast say."""
    if weight.device.type != "cuda":
        return torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


def _tall(weights: Tensor, rows: Tensor) -> Tensor:
    """Rows times the weights' transpose, [n, V].

    A CPU reads the weights two to three times as fast for a handful of rows (a step of decoding) if these are the
    columns on the right.
    """
    if rows.device.type == "cpu" and len(rows) <= HANDFUL:
        return _product(weights, rows.t()).t().contiguous()
    return _product(rows, weights.t())


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


@dataclass
class Chunk:
    """What is known of a chunk of rows; n rows.

    Attributes:
        scaled: `inner` times the hidden states, [n, H].
        targets: int64 [n].
        logps: log p of each target in nats, [n].
        entropy: Of the whole distribution in nats, [n]; None if it was not asked for.
        correct: 1.0 where the target is the most probable token, [n]; None if it was not asked for.
        normaliser: logsumexp(y), [n].
        at_target: y of the target, [n].
        kept: For each block exp(y - top) [n, block], and top, the largest y up to and with that block [n].
    """

    scaled: Tensor
    targets: Tensor
    logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    normaliser: Tensor
    at_target: Tensor
    kept: list[tuple[Tensor, Tensor]]


def score(hidden: Tensor, targets: Tensor, head: Projection, keep: bool = False, moments: bool = True) -> Chunk:
    """One walk over the vocabulary for a chunk of rows.

    Args:
        hidden: [n, H].
        targets: int64 [n].
        head: The projection.
        keep: Whether to keep what `Gradients.add` needs.
        moments: Whether entropy and correctness are wanted too.
    """
    scaled = hidden.to(head.exact) * head.inner
    top = torch.full_like(scaled[:, 0], torch.finfo(scaled.dtype).min)
    total, at_target, moment = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    best, kept = torch.zeros_like(targets), []
    for block in head.blocks():
        y = head.logits(scaled, block)
        inside = (targets >= block.start) & (targets < block.stop)
        wanted = y.gather(1, (targets - block.start).clamp(0, y.shape[1] - 1)[:, None])[:, 0]
        at_target = torch.where(inside, wanted, at_target)
        before = top
        if moments:
            largest, where = y.max(1)
            best = torch.where(largest > before, where + block.start, best)
        else:
            largest = y.amax(1)
        top = torch.maximum(before, largest)
        y -= top[:, None]
        exponentials = torch.exp(y)
        shrunk = torch.exp(before - top)
        if moments:  # sum of exp(y - top) * (y - top)
            moment = shrunk * (moment + (before - top) * total) + torch.linalg.vecdot(exponentials, y)
        total = shrunk * total + exponentials.sum(1)
        if keep:
            kept.append((exponentials, top))
    log_total = total.log()
    normaliser = top + log_total
    entropy = log_total - moment / total if moments else None
    correct = (best == targets).to(scaled.dtype) if moments else None
    return Chunk(scaled, targets, at_target - normaliser, entropy, correct, normaliser, at_target, kept)


@dataclass
class Gradients:
    """Gradients of a sum over rows, gathered chunk by chunk.

    Attributes:
        head: The projection.
        weight: [V, H] in float32 at least; None where the weights are frozen.
        bias: [V]; None where there is none or it is frozen.
    """

    head: Projection
    weight: Tensor | None = field(init=False, default=None)
    bias: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Starts at zero."""
        head = self.head
        if head.weight.requires_grad:
            self.weight = torch.zeros_like(head.weight, dtype=head.exact, memory_format=torch.contiguous_format)
        if head.bias is not None and head.bias.requires_grad:
            self.bias = torch.zeros_like(head.bias, dtype=head.exact)

    def add(self, chunk: Chunk, of_logps: Tensor, of_entropy: Tensor | None = None) -> Tensor:
        """Adds a chunk's part to the weights' gradients.

        Args:
            chunk: As `score(..., keep=True)` made it.
            of_logps: The loss's derivative by each log-probability, [n].
            of_entropy: By each entropy, [n]; None = none.

        Returns:
            The gradient of the chunk's hidden states, [n, H], float32 at least.
        """
        head, of_logps = self.head, of_logps.to(self.head.exact)
        if of_entropy is not None:
            of_entropy = of_entropy.to(head.exact)
        outer = 1.0 if head.cap is None else 1.0 / head.temperature
        at_target = of_logps * outer * _slope(chunk.at_target, head)
        of_rows = head.weight.index_select(0, chunk.targets).to(head.exact) * at_target[:, None]
        self._add_at_targets(chunk, at_target)
        for block, (exponentials, top) in zip(head.blocks(), chunk.kept, strict=True):
            to_probability = torch.exp(top - chunk.normaliser) * outer
            if head.cap is None and of_entropy is None:
                factor = -of_logps * to_probability
            else:
                exponentials, factor = _bent(chunk, exponentials, top, of_logps, of_entropy, head), to_probability
            narrow = exponentials.to(head.operands)
            of_rows.addcmul_(_product(narrow, head.operand(block)), factor[:, None])
            self._add_block(block, narrow, factor, chunk.scaled)
        return of_rows.mul_(head.inner)

    def _add_at_targets(self, chunk: Chunk, at_target: Tensor) -> None:
        if self.weight is not None:
            self.weight.index_add_(0, chunk.targets, chunk.scaled * at_target[:, None])
        if self.bias is not None:
            self.bias.index_add_(0, chunk.targets, at_target * self.head.inner)

    def _add_block(self, block: slice, exponentials: Tensor, factor: Tensor, scaled: Tensor) -> None:
        if self.weight is not None:
            rows = scaled * factor[:, None]
            if exponentials.dtype == rows.dtype:
                self.weight[block].addmm_(exponentials.t(), rows)
            else:
                self.weight[block] += _product(exponentials.t(), rows.to(exponentials.dtype))
        if self.bias is not None:
            self.bias[block] += (exponentials.to(factor.dtype).t() @ factor) * self.head.inner


def _slope(y: Tensor, head: Projection) -> Tensor:
    """The soft-cap's own derivative at its result y."""
    return torch.ones_like(y) if head.cap is None else 1 - (y * (head.temperature / head.cap)).square()


def _bent(
    chunk: Chunk, exponentials: Tensor, top: Tensor, of_logps: Tensor, of_entropy: Tensor | None, head: Projection
) -> Tensor:
    """exp(y - top) times the derivative by y of what is not one factor per row: the entropy's, the soft-cap's."""
    # Where the exponential is 0 its logarithm does not matter: the product is 0.
    y = exponentials.clamp(min=torch.finfo(exponentials.dtype).tiny).log_().add_(top[:, None])
    slope = _slope(y, head)
    if of_entropy is None:
        return slope.mul_(exponentials).mul_(-of_logps[:, None])
    assert chunk.entropy is not None
    y.sub_((chunk.normaliser - chunk.entropy)[:, None]).mul_(of_entropy[:, None]).add_(of_logps[:, None]).neg_()
    return y.mul_(exponentials).mul_(slope)
