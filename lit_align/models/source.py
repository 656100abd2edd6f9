"""Where a network comes from: what a user writes under `policy:`, `reference:`, `reward_model:` or `critic:`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

QUANTIZATIONS = ("nf4", "int8")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass
class LoraSettings:
    """Low-rank adapters on a frozen base (https://arxiv.org/abs/2106.09685).

    Attributes:
        r: Rank of the update.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout on the adapters' input, in training.
        target_modules: Names (or endings of names) of the layers that get adapters, one regular expression that the
            whole name matches, or "all-linear" for every linear layer but the head.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class ModelSource:
    """Where a network comes from: `path` (weights exist) or `config` (start from scratch), one of the two.

    Attributes:
        path: Hugging Face id, folder, or .gguf file. A folder may also hold an adapter; it is merged into its base.
        gguf_file: Name of the GGUF file inside `path`; it is dequantised.
        config: Configuration of a fresh model, `model_type` and that type's own keys; `vocab_size` and the ids of the
            special tokens come from the tokenizer.
        tokenizer: Hugging Face id or folder of the tokenizer; by default it is taken from `path`.
        revision: Branch, tag or commit of a Hugging Face id.
        dtype: Type of the weights: float32, bfloat16, float16 or float64. A scalar head is float32 at least.
        trust_remote_code: Run Python code that comes with the model. Leave it off unless you have read that code.
        quantization: Hold the matrices of a frozen model in 4 bits ("nf4", with double quantisation: QLoRA) or 8
            ("int8"); null leaves them in `dtype`, which is then also what is computed in. What is trained needs `lora`.
        lora: Train low-rank adapters on the frozen model; null trains all weights.
        gradient_checkpointing: Compute activations again in the backward pass to save memory.
        compile: Compile the decoder layers (`torch.compile`): about a minute at the first step.
        attention: "packed", which also serves padded batches and generation, or one of transformers' own ("sdpa",
            "eager", ...), for which packed batches are padded before the trunk, as for networks that cannot be
            packed at all (docs/architectures.md).
    """

    path: str | None = None
    gguf_file: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    quantization: str | None = None
    lora: LoraSettings | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: str = "packed"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def location(self) -> tuple[str | None, str | None]:
        """Folder or id, and the GGUF file in it if there is one."""
        if self.path and self.path.endswith(".gguf") and not self.gguf_file:
            file = Path(self.path)
            return str(file.parent), file.name
        return self.path, self.gguf_file

    @property
    def tokenizer_location(self) -> tuple[str | None, str | None]:
        """Folder or id of the tokenizer, and the GGUF file in it if there is one."""
        return (self.tokenizer, None) if self.tokenizer else self.location

    def validate(self, name: str = "model", trained: bool = False) -> ModelSource:
        """Checks what can be checked without loading anything.

        Args:
            name: What the user calls this source ("policy", ...); it starts the messages.
            trained: Whether the network is going to be trained.

        Raises:
            ValueError: With what is wrong and how to mend it.
        """
        if (self.path is None) == (self.config is None):
            got = "neither" if self.path is None else "both"
            raise ValueError(f"{name}: give either path (a model to start from) or config (from scratch); got {got}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{name}.dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.config is not None:
            self._validate_config(name)
        else:
            self._validate_path(name)
        if self.quantization is not None:
            self._validate_quantization(name, trained)
        if self.lora is not None and (self.lora.r < 1 or not 0 <= self.lora.dropout < 1):
            raise ValueError(
                f"{name}.lora: expected r >= 1 and 0 <= dropout < 1; got r={self.lora.r}, dropout={self.lora.dropout}"
            )
        return self

    def _validate_config(self, name: str) -> None:
        if "model_type" not in (self.config or {}):
            raise ValueError(f"{name}.config: model_type is missing (llama, qwen2, gpt2, ...)")
        if self.tokenizer is None:
            raise ValueError(f"{name}.tokenizer: a model from config needs a tokenizer; give its folder or id")
        if self.gguf_file is not None:
            raise ValueError(f"{name}.gguf_file: it belongs to path, and config was given")

    def _validate_path(self, name: str) -> None:
        path = Path(str(self.path))
        if path.is_file() and path.suffix != ".gguf":
            mend = "; turn it into a folder with the export command" if path.suffix == ".ckpt" else ""
            raise ValueError(f"{name}.path: expected a folder, a Hugging Face id or a .gguf file; got {path}{mend}")
        folder, gguf_file = self.location
        if gguf_file and Path(str(folder)).is_dir() and not (Path(str(folder)) / gguf_file).is_file():
            there = sorted(p.name for p in Path(str(folder)).glob("*.gguf")) or "none"
            raise ValueError(f"{name}.gguf_file: no {gguf_file} in {folder}; .gguf files there: {there}")

    def _validate_quantization(self, name: str, trained: bool) -> None:
        where = f"{name}.quantization"
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"{where}: expected one of {', '.join(QUANTIZATIONS)}, or null; got {self.quantization!r}")
        if self.config is not None:
            raise ValueError(
                f"{where}: a model from scratch (config) has no weights yet that could be held in {self.quantization}, "
                "and all of its weights are trained; leave quantization out"
            )
        if self.location[1]:
            raise ValueError(
                f"{where}: the weights of a GGUF file are packed in a way of their own; turn it into a folder first "
                "(python -m lit_align export --checkpoint FILE.gguf --out FOLDER) and give that as path"
            )
        if self.dtype == "float64":
            raise ValueError(f"{where}: there is no float64 with it; set {name}.dtype to float32 or bfloat16")
        if trained and self.lora is None:
            raise ValueError(
                f"{where}: weights in {self.quantization} cannot be trained themselves; train adapters on them "
                f"({name}.lora: {{r: 16}}), or leave quantization out"
            )

    def frozen(self) -> ModelSource:
        """The same weights to look things up in, not to train: no adapters, no activation checkpointing."""
        return replace(self, lora=None, gradient_checkpointing=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain types alone, as a checkpoint may hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSource:
        """The inverse of `to_dict`."""
        lora = values.get("lora")
        return cls(**{**values, "lora": None if lora is None else LoraSettings(**lora)})
