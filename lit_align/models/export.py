"""Trained networks as Hugging Face folders, which plain transformers loads with the same outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_align.models.adapters import ADAPTER_CONFIG, merged_state
from lit_align.models.checkpoint import AUTO, is_scalar, plain_config, read_checkpoint, rebuild, restore_tokenizer
from lit_align.models.folder import place_for, whole_folder
from lit_align.models.modes import evaluating, has_adapters
from lit_align.models.quantization import adopt, quantization_of, quantizing_options
from lit_align.models.quiet import quiet_loading
from lit_align.models.source import ModelSource
from lit_align.models.tokens import end_of_turn_id, separate_pad_token

if TYPE_CHECKING:
    from peft import PeftModel

log = getLogger(__name__)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of outputs, relative to their scale, where the same weights are read back to the same device."""
ROUNDED = 10
"""How many times that is let pass where adapters were folded in, or where the model lies on another device."""


def export(
    checkpoint: str,
    out: str,
    role: str | None = None,
    merge_lora: bool = True,
    trust_remote_code: bool = False,
    for_trunk: bool = False,
) -> None:
    """Turns a checkpoint into a Hugging Face folder.

    Args:
        checkpoint: The .ckpt file.
        out: The folder to write; a model that an export wrote there is replaced, see `place_for`.
        role: Which network: policy, reward_model or critic. By default the one that the stage trains: the policy, or
            else the reward model.
        merge_lora: Fold adapters into their base; otherwise write the adapter alone, beside the tokenizer.
        trust_remote_code: Run Python code that comes with the model, if it was trained with such code.
        for_trunk: Write adapters and head alone, as LitPPO's shared_trunk reads them: also where plain transformers
            would read a score at the wrong token, because the base pads with one that ends texts.

    Raises:
        ValueError: When the checkpoint cannot be read, something at `out` has to stay, or the folder does not give the
            checkpoint's outputs.
    """
    place_for(out)  # before anything is read
    entry, state = read_checkpoint(checkpoint)
    sources = [ModelSource.from_dict(described["source"]) for described in entry["roles"].values()]
    place_for(out, [source.location[0] or "" for source in sources if source.lora is not None])
    role = role or ("policy" if "policy" in entry["roles"] else next(iter(entry["roles"])))
    model = rebuild(entry, state, role, trust_remote_code)
    export_module(model, restore_tokenizer(entry), out, merge_lora, for_trunk)


def export_module(
    module: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    merge_lora: bool = True,
    for_trunk: bool = False,
) -> None:
    """Writes a live model, which stays as it is, and its tokenizer to a Hugging Face folder, and reads it back.

    `AutoModelForCausalLM` (or `AutoModelForSequenceClassification`) and `AutoTokenizer` load the folder. Only one
    process may write.

    Args:
        module: The model, with adapters or without.
        tokenizer: As used in training, with its chat template.
        out: The folder; an exported model that is there already is replaced once the new one has been verified.
        merge_lora: Fold adapters into their base; otherwise write the adapter alone, which needs its base to load.
        for_trunk: See `export`.

    Raises:
        ValueError: When the folder does not give the model's outputs, or something at `out` has to stay, or an
            adapter's base has no place of its own, or there is no adapter for a trunk.
    """
    if for_trunk and not has_adapters(module):
        raise ValueError(
            "for_trunk: the network was trained whole; train it with lora on the base that is to be shared"
        )
    tokenizer = deepcopy(tokenizer)
    if is_scalar(module):
        separate_pad_token(tokenizer)
    bases = [str(module.get_base_model().name_or_path)] if has_adapters(module) else []
    with whole_folder(Path(out), bases) as folder:
        if has_adapters(module) and (for_trunk or not merge_lora):
            _write_adapter(module, tokenizer, folder, for_trunk)
        else:
            _write_model(module, tokenizer, folder)
        tokenizer.save_pretrained(folder)
        verify(module, tokenizer, folder, for_trunk)


def verify(
    module: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, for_trunk: bool = False
) -> None:
    """Loads the folder as a user would, into the host's memory, and compares outputs on a small padded batch.

    An adapter alone that was trained on a quantised base is compared on a base that is quantised in the same way.
    With `for_trunk` the padding token is the tokenizer's, whatever the base's configuration says.

    Raises:
        ValueError: When they differ by more than rounding.
    """
    extra: dict[str, Any] = {"num_labels": 1} if is_scalar(module) else {}
    auto = AUTO["scalar" if extra else "causal"]
    kind, dtype = quantization_of(module) if (folder / ADAPTER_CONFIG).is_file() else None, module.dtype
    if kind is not None:
        extra |= quantizing_options(kind, "export")
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        read_back = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=_has_own_code(module), **extra)
    if kind is not None:
        adopt(read_back, kind)
    if for_trunk:
        read_back.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    inputs = _small_batch(module, tokenizer)
    expected, got = _outputs(module, inputs), _outputs(read_back, inputs)
    difference = float((expected - got).abs().max() / _scale(read_back, expected))
    rounded = has_adapters(module) or module.device.type != "cpu"
    tolerance = TOLERANCES[dtype] * (ROUNDED if rounded else 1)
    if not difference <= tolerance:  # written so that NaN fails
        raise ValueError(
            f"the exported folder does not give the model's outputs: relative difference {difference:.3g}, "
            f"expected at most {tolerance:g} in {dtype}"
        )


def _write_model(module: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model: Any = module
    state = None
    if has_adapters(module):
        model, state = module.get_base_model(), merged_state(module, "cpu")
    with quiet_loading():
        model.save_pretrained(folder, state_dict=state)
    config = plain_config(model)
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        _generation_config(model.generation_config, tokenizer).save_pretrained(folder)


def _generation_config(trained: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation ends where the tokenizer's text, or a turn of its template, ends; whatever the base knew."""
    config = deepcopy(trained)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [i for i in (*known, tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if i is not None]
    ends = list(dict.fromkeys(ends))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.pad_token_id = tokenizer.pad_token_id
    config._from_model_config = False
    return config


def _write_adapter(module: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, for_trunk: bool) -> None:
    base = str(module.get_base_model().name_or_path)
    if not base:
        raise ValueError(
            "the adapter's base is not a folder or Hugging Face id that could be loaded again (it came from a GGUF "
            "file, an adapter, or from scratch); export with merge_lora=true"
        )
    padding = AutoConfig.from_pretrained(base, trust_remote_code=_has_own_code(module)).get_text_config().pad_token_id
    if is_scalar(module) and padding != tokenizer.pad_token_id and not for_trunk:
        raise ValueError(
            f"an adapter has no configuration of its own, and its base {base!r} pads with token {padding}, where this "
            f"model needs {tokenizer.pad_token_id}: scores would be read at the wrong token; export with "
            "merge_lora=true (or for_trunk=true, if LitPPO alone is to read them)"
        )
    if (kind := quantization_of(module)) is not None:
        log.warning("the adapter was trained on a base in %s; on the plain %s it gives other numbers", kind, base)
    # Without this argument peft asks the Hub whether the vocabulary was resized.
    module.save_pretrained(str(folder), save_embedding_layers=False)
    file = folder / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _has_own_code(module: Any) -> bool:
    """Whether the model's class came with its weights: then that code is running already."""
    model = module.get_base_model() if has_adapters(module) else module
    return type(model).__module__.startswith("transformers_modules.")


def _small_batch(module: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Two rows of 8 and 5 tokens: int64 [2, 8], drawn without touching the global generator."""
    size = module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.randint(size - 1, (2, 8), generator=generator)
    input_ids += input_ids >= pad_token_id  # any token but padding
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 5:], attention_mask[1, 5:] = pad_token_id, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def _outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the real positions, or scores, in float64 on the CPU, computed without autocast."""
    with evaluating(model), _exact(model):
        logits = model(**{key: value.to(model.device) for key, value in inputs.items()}).logits.double().cpu()
    return logits[inputs["attention_mask"].bool()] if logits.dim() == 3 else logits


def _scale(model: Any, outputs: Tensor) -> Tensor:
    """What rounding is relative to: the largest output. A score may be near 0 by cancellation, its terms are not."""
    scale = outputs.abs().max().clamp(min=1e-30)
    return torch.maximum(scale, model.score.weight.detach().double().norm()) if is_scalar(model) else scale


@contextmanager
def _exact(model: Any) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
