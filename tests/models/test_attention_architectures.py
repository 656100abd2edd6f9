"""The table in docs/architectures.md: a packed forest equals its sequences alone, which no packing code sees."""

from pathlib import Path

import pytest
import torch

from lit_align.batch import StepTotals, pack
from lit_align.models import token_logps
from lit_align.models.packable import KEPT_ARGUMENTS, WINDOWS_IN_MASKS
from tests.models.architectures import ARCHITECTURES, alone, build, forest

TOTALS = StepTotals(1.0, 1.0)
NAMES = [architecture.name for architecture in ARCHITECTURES]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


@pytest.fixture
def exact(monkeypatch):
    """Norms, softmax and rotations ask for float32 by name: here they get float64, so nothing is rounded to it."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)


def relative(found, expected, floor=0.0):
    return float((found - expected).norm()) / max(float(expected.norm()), floor)


def gradients(model, logps):
    model.zero_grad()
    logps.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=NAMES)
def test_a_packed_forest_equals_its_sequences_alone(architecture, exact):
    examples = forest(torch.Generator().manual_seed(1))
    model, plain = build(architecture, "packed", torch.float64), build(architecture, architecture.own, torch.float64)
    assert (model.config._attn_implementation == "packed") == architecture.packed
    expected, found = alone(plain, examples), token_logps(model, pack(examples, range(3), TOTALS))
    assert relative(found.detach(), expected.detach()) < architecture.limit / 10
    want, have = gradients(plain, expected), gradients(model, found)
    whole = float(torch.stack([gradient.norm() for gradient in want.values()]).norm())
    # Keys' biases have no gradient but rounding where nothing rotates the keys: noise is measured against the whole.
    for name in want.keys() | have.keys():
        nothing = torch.zeros_like(dict(model.named_parameters())[name])
        assert relative(have.get(name, nothing), want.get(name, nothing), 1e-3 * whole) < architecture.limit, name


@pytest.mark.parametrize("name", ["Llama", "Gemma 2, soft-capped, sliding window", "Mistral, sliding window"])
def test_in_bfloat16_packing_costs_no_more_than_bfloat16_itself(name):
    """Against float32 with the same rounded weights: the packed row is as far away as sequences alone are."""
    architecture = ARCHITECTURES[NAMES.index(name)]
    examples = forest(torch.Generator().manual_seed(1))
    rounded = build(architecture, architecture.own, torch.bfloat16)
    wide = build(architecture, architecture.own)
    wide.load_state_dict(rounded.state_dict())
    exact = alone(wide, examples).detach()
    separate = (alone(rounded, examples).detach() - exact).square().mean().sqrt()
    packed = token_logps(build(architecture, "packed", torch.bfloat16), pack(examples, range(3), TOTALS)).detach()
    assert float((packed - exact).square().mean().sqrt()) < 1.25 * float(separate)


def test_the_document_lists_what_is_tested():
    table = DOCUMENT.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    listed = [tuple(cell.strip(" `") for cell in row[1:4]) for row in rows]
    ways = {True: "packed", False: "padded before the trunk"}
    assert listed[1:] == [(a.name, a.model_type, ways[a.packed]) for a in ARCHITECTURES]


def _models():
    """The modelling files of the transformers at hand that let attention be exchanged, by model type."""
    import transformers.models

    files = sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py"))
    sources = {file.stem.removeprefix("modeling_"): file.read_text(encoding="utf-8") for file in files}
    return {n: s for n, s in sources.items() if "_supports_attention_backend = True" in s and "ForCausalLM(" in s}


def test_windows_that_layers_know_through_the_mask_alone_are_known():
    """Sliding masks are made, no window is handed to the attention: by layer types, or listed, or no packing."""
    through_mask = {
        name
        for name, source in _models().items()
        if "create_sliding_window_causal_mask" in source and "sliding_window=" not in source
    }
    by_layer_types = {"qwen2_moe"}
    assert through_mask - by_layer_types == set(WINDOWS_IN_MASKS)


def _kept(source):
    """Whether a decoder layer calls its attention without handing on what it does not know."""
    layers = [part for part in source.split("\nclass ") if part.partition("(")[0].endswith("DecoderLayer")]
    calls = [call.partition("\n        )\n")[0] for layer in layers for call in layer.split("= self.self_attn(\n")[1:]]
    return any("**" not in call for call in calls)


def test_layers_that_keep_arguments_to_themselves_are_known():
    assert {name for name, source in _models().items() if _kept(source)} == set(KEPT_ARGUMENTS)
