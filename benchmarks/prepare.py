"""What both sides are given: the same weights in a folder, the same token ids in a file, in the same order.

Real records are tokenised once, by this project's data modules, and written down in the order of their step plan.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.settings import Case, Settings, records_of
from datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_align.batch import Branch, Example
from lit_align.models.load import load_scalar_model, load_tokenizer
from lit_align.models.source import ModelSource
from lit_align.models.tokens import separate_pad_token

MODULES = {"sft": SFTDataModule, "dpo": PreferenceDataModule, "rm": PreferenceDataModule, "ppo": PromptDataModule}


def data_module(case: Case, settings: Settings, scratch: Path) -> Any:
    """The project's own data module on the case's real records, with the settings that both sides share."""
    return MODULES[case.stage](
        train=str(records_of(case)),
        tokenizer=str(scratch / "policy"),
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        overlong="truncate",
        seed=settings.seed,
        cache_dir=str(scratch.parent / "cache"),
    )


def prepare(case: Case, settings: Settings, model: Path, scratch: Path) -> None:
    """Writes `policy/`, `scalar/` (a reward model), `tokens.json` and `settings.json` below `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    settings.save(scratch / "settings.json")
    cut_model(model, scratch / "policy", settings.layers)
    if case.stage in ("rm", "ppo"):
        scalar_model(scratch / "policy", scratch / "scalar", settings.seed)
    steps = settings.warmup + settings.steps
    examples = real(case, settings, scratch, steps) if case.records else made_up(case, settings, scratch, steps)
    (scratch / "tokens.json").write_text(json.dumps(examples), encoding="utf-8")


def cut_model(source: Path, folder: Path, layers: int) -> None:
    """Saves the first layers of a model in float32, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def scalar_model(source: Path, folder: Path, seed: int) -> None:
    """Saves a reward model with a random head, and a padding token of its own that no text ends with."""
    origin = ModelSource(path=str(source))
    model = load_scalar_model(origin)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight, std=model.config.hidden_size**-0.5)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(origin, "reward_model")
    separate_pad_token(tokenizer)
    tokenizer.save_pretrained(folder)


def real(case: Case, settings: Settings, scratch: Path, steps: int) -> list[dict[str, Any]]:
    """The examples of the first steps of the plan, in its order."""
    data = data_module(case, settings, scratch)
    data.prepare_data()
    data.setup("fit")
    loader = data.loader("train", shuffle=True)
    chosen = [int(i) for step in range(steps) for i in loader.plan(0).examples(step)]
    if len(chosen) < steps * settings.batch_size:
        raise SystemExit(f"{case.name}: {steps} steps of {settings.batch_size} need more records than there are")
    dataset = data.datasets["train"]
    if case.stage == "ppo":
        return [{"prompt": dataset[i][0].tolist(), "branches": [], "weights": []} for i in chosen]
    return [as_dict(dataset[i]) for i in chosen]


def made_up(case: Case, settings: Settings, scratch: Path, steps: int) -> list[dict[str, Any]]:
    """Pairs of random token ids, whose prompts are about `ratio` times as long as their answers.

    Each length is drawn within 20 % of its mean; prompt and answer together have at most `max_length` tokens.
    """
    vocabulary = json.loads((scratch / "policy" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    generator = np.random.default_rng(settings.seed)
    together = settings.max_length / 1.2
    answer = together / (1 + float(case.ratio or 1))
    examples = []
    for _ in range(steps * settings.batch_size):
        sizes = [int(size * generator.uniform(0.8, 1.2)) for size in (together - answer, answer, answer)]
        # 17: the ids before it are control tokens, of which one is the padding.
        prompt, *branches = (generator.integers(17, vocabulary, size).tolist() for size in sizes)
        weights = [[1.0] * len(branch) for branch in branches]
        examples.append({"prompt": prompt, "branches": branches, "weights": weights})
    return examples


def as_dict(example: Example) -> dict[str, Any]:
    """An example in plain lists."""
    return {
        "prompt": example.prefix_ids.tolist(),
        "branches": [branch.input_ids.tolist() for branch in example.branches],
        "weights": [branch.weights.tolist() for branch in example.branches],
    }


def as_example(row: dict[str, Any]) -> Example:
    """The inverse of `as_dict`."""
    branches = [
        Branch(torch.tensor(ids), torch.tensor(weights))
        for ids, weights in zip(row["branches"], row["weights"], strict=True)
    ]
    return Example(torch.tensor(row["prompt"], dtype=torch.long), tuple(branches))
