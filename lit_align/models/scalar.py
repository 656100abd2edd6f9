"""Scalar models: a language model's trunk under one number per position (reward model, critic)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.models.slices import HEAD, make_whole
from lit_align.models.tokens import separate_pad_token


class ScalarHead(nn.Linear):
    """The score: weights and arithmetic in float32 at least, whatever the trunk and autocast are in.

    Differences of rewards are what the loss is made of; in bfloat16 a reward of 4 has steps of 1/64.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] to numbers [..., 1]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def install_head(model: PreTrainedModel, fresh: bool) -> None:
    """Puts a `ScalarHead` in the place of the model's own head.

    Args:
        model: A sequence classifier with one label, whose head is a linear layer called `score`.
        fresh: The weights at hand had no head. It begins at zero: a new reward model prefers nothing (its first loss
            is ln 2, exactly) and a new critic expects nothing, however the trunk's states are scaled. (InstructGPT's
            line draws it with standard deviation 1 / sqrt(H + 1), https://arxiv.org/abs/1909.08593.)

    Raises:
        ValueError: When the architecture keeps its head elsewhere.
    """
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"{type(model).__name__}: expected a linear head `{HEAD}` with one output; got {head}. "
            "A reward model or critic needs an architecture of the decoder kind."
        )
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    scalar = ScalarHead(head.in_features, 1, bias=head.bias is not None, device="meta")
    scalar.load_state_dict({key: value.to(dtype) for key, value in head.state_dict().items()}, assign=True)
    if fresh:
        nn.init.zeros_(scalar.weight)
        if scalar.bias is not None:
            nn.init.zeros_(scalar.bias)
    setattr(model, HEAD, scalar.requires_grad_(True))


@contextmanager
def head_in_float32(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """While open, `from_pretrained` of this class reads a stored head in float32, whatever dtype it is asked for.

    Without it a head that was trained in float32 is rounded on its way into a bfloat16 model.
    """
    before = model_class._keep_in_fp32_modules_strict
    model_class._keep_in_fp32_modules_strict = {*(before or ()), rf"^{HEAD}\."}
    try:
        yield
    finally:
        model_class._keep_in_fp32_modules_strict = before


def align_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes model and tokenizer agree on a padding token that no text ends with; both are changed.

    The folder that is exported then gives the right score with plain transformers, which reads it at the last
    token that is not padding.
    """
    pad_token_id = separate_pad_token(tokenizer)
    config = model.config.get_text_config()
    if pad_token_id >= config.vocab_size:
        make_whole(model.get_input_embeddings())
        model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().get_parameter("weight")[pad_token_id].zero_()  # never attended to
        model.config._name_or_path = ""  # what lies there has one token less
    config.pad_token_id = pad_token_id
