"""A language model's logits as its own code makes them: for heads that are more than a matrix and a bias."""

from __future__ import annotations

from logging import getLogger

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_align.models.modes import evaluating
from lit_align.models.projection import plain_projection
from lit_align.models.sharding import through_root

log = getLogger(__name__)


def plain_stats(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies and correctness of a chunk of rows, the logits computed again for the gradient.

    Args:
        model: Whose head is used, whatever it is.
        hidden: [n, H].
        targets: int64 [n].
        temperature: Divides the logits.
        entropy_gradient: Whether the entropy is differentiable too.

    Returns:
        Three tensors [n], float32; see `TokenStats`.
    """
    _say_once(model)
    arguments = (hidden, targets, model, temperature, entropy_gradient)
    if torch.is_grad_enabled():
        return checkpoint(_stats_of_logits, *arguments, use_reentrant=False)
    return _stats_of_logits(*arguments)


def _stats_of_logits(
    hidden: Tensor, targets: Tensor, model: PreTrainedModel, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, ...]:
    logps = torch.log_softmax(head_logits(model, hidden) / temperature, -1)  # [rows, V]
    chosen = logps.gather(-1, targets[:, None])[:, 0]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        distribution = logps if entropy_gradient else logps.detach()
        entropy = -(distribution.exp() * distribution).sum(-1)
    correct = (logps.detach().argmax(-1) == targets).float()
    return chosen, entropy, correct


def _say_once(model: PreTrainedModel) -> None:
    if not getattr(model, "_head_was_named", False):
        model._head_was_named = True
        log.warning(
            "%s: the head is not a plain linear layer; its logits are computed the plain way, a chunk at a time, once "
            "more in the backward pass",
            type(model).__name__,
        )


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits in float32 [N, V] of hidden states [N, H], with the model's own post-processing.

    Covers a bias (Phi), a multiplier (Cohere: `logit_scale`), a divisor (Granite: `logits_scaling`) and
    soft-capping (Gemma 2: `final_logit_softcapping`). A head that is a matrix is multiplied as in training, with
    operands of the same type: what is sampled from is what is scored.
    """
    plain = plain_projection(model, 1.0)
    with torch.autocast(hidden.device.type, enabled=False):
        if plain is not None:
            return plain.logits(hidden.to(plain.exact) * plain.inner, slice(None)).float()
        config = model.config.get_text_config()
        logits = model.get_output_embeddings()(hidden).float()
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


@through_root
def _known_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return head_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares `head_logits` with the model's own logits on four tokens, once, when a policy is built.

    Raises:
        ValueError: The architecture does something to its logits that `head_logits` does not know.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[0]
        own, known = logits.float(), _known_logits(model, ids)
    # The model's own head may work in bfloat16, which has 8 bits.
    tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
    difference = float((own - known).abs().max() / own.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise ValueError(
            f"{type(model).__name__} post-processes its logits in a way that is not known here (relative difference "
            f"{difference:.2g}): its log-probabilities would be wrong"
        )
