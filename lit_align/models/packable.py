"""Which architectures "packed" attention computes the same for as their own."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}
WINDOWS_IN_MASKS = ("doge", "phimoe")
"""Model types whose layers know of their sliding window through the mask alone."""
KEPT_ARGUMENTS = ("nemotron",)
"""Model types whose layers do not hand arguments on to their attention."""


def other_layers(config: PreTrainedConfig) -> set[str]:
    """Types of layers that are something else than attention to all tokens or to a window of them."""
    return set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES


def is_packable(model: PreTrainedModel) -> bool:
    """Whether a packed row gives the model's own numbers.

    It does not where layers carry something along the row (recurrences and convolutions would mix the sequences of a
    pack), where attention is not exchangeable, looks ahead or in chunks, or is more than scaled dot products with a
    window and a cap.
    """
    config = model.config.get_text_config()
    products = model._supports_sdpa or getattr(config, "attn_logit_softcapping", None) is not None
    exchangeable = model._supports_attention_backend and products and not model._is_stateful
    looks_ahead = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False
    chunked = bool(getattr(config, "attention_chunk_size", None))
    reached = config.model_type not in KEPT_ARGUMENTS
    hidden_window = config.model_type in WINDOWS_IN_MASKS and getattr(config, "sliding_window", None) is not None
    return exchangeable and not other_layers(config) and reached and not (looks_ahead or chunked or hidden_window)
