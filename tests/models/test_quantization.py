"""Quantised bases: what packed weights stand for, that layers compute with just that, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.batch import Branch, Example, pack
from lit_align.batch.types import StepTotals
from lit_align.models import scalar_at_ends, token_logps, token_loss
from lit_align.models.adapters import add_adapters, merged_state, plain_name
from lit_align.models.fingerprint import base_fingerprint, fingerprint
from lit_align.models.layers import is_plain_linear
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.meta import meta_network
from lit_align.models.modes import base_model, evaluating
from lit_align.models.quantization import (
    QuantizedLinear,
    _tables,
    _take_int8,
    _take_nf4,
    bnb_config,
    dequantized_state,
    quantization_of,
    quantize_shapes,
    quantized_layers,
    weight_count,
)
from lit_align.models.reference import reference_mode
from lit_align.models.scalar import ScalarHead
from lit_align.models.shapes import weights_of
from lit_align.models.sharding import Sharding, building_in_shards
from lit_align.models.source import LoraSettings, ModelSource

KINDS = ("nf4", "int8")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
# QLoRA (arXiv:2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def dynamic_map():
    """The signed 8-bit dynamic data type (arXiv:2110.02861): an exponent of base 10, a linear fraction in [0.1, 1]."""
    values = [0.0, 1.0]
    for digits in range(7):
        edges = torch.linspace(0.1, 1, 2**digits + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (digits - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float64)


def nearest(values, codes):
    return codes[(values[..., None] - codes).abs().argmin(-1)]


def in_blocks(values, size):
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


def unpacked(layer):
    """Codes (blocks of 64) and numbers of the map (blocks of 256) that the packed bytes of nf4 stand for, float64."""
    count = layer.in_features * layer.out_features
    indices = torch.stack([layer.weight.flatten() >> 4, layer.weight.flatten() & 15], 1).flatten()[:count].long()
    codes = in_blocks(torch.tensor(NF4, dtype=torch.float64)[indices], 64)
    return codes, in_blocks(dynamic_map()[layer.block_scales.long()], 256)


def decoded(layer):
    """What packed bytes stand for, in float64: an independent reading of them."""
    scales = layer.scales.view(torch.float32).double()
    if layer.kind == "int8":
        return layer.weight.double() * scales[:, None] / 127
    codes, of_scales = unpacked(layer)
    scales = (of_scales * scales[:-1, None]).flatten()[: len(codes)] + scales[-1]
    shape = (layer.out_features, layer.in_features)
    return (codes * scales[:, None]).flatten()[: shape[0] * shape[1]].view(shape)


def farther(got, values, codes):
    """By how much the numbers chosen lie farther away than the nearest code; halfway between two it is rounding."""
    return float(((got - values).abs() - (nearest(values, codes) - values).abs()).max())


def check_layer(layer, weight):
    """Its bytes are read rightly, and every one of them is of the nearest code."""
    got, want = layer.dequantized(torch.float32).double(), decoded(layer)
    assert got.shape == weight.shape
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7 * float(want.abs().max()))
    assert float((got - weight).abs().mean()) > 1e-4 * float(weight.abs().max())
    if layer.kind == "int8":
        weight = weight.half().double()  # LLM.int8() reads weights in float16
        rows = weight.abs().amax(1)
        assert torch.equal(layer.scales.view(torch.float32).double(), rows)
        whole = torch.arange(-127, 128, dtype=torch.float64)
        assert farther(layer.weight.double(), weight / rows[:, None] * 127, whole) < 1e-4
        return
    codes, of_scales = unpacked(layer)
    blocks = in_blocks(weight.flatten(), 64)
    scales = blocks.abs().amax(1)
    assert farther(codes, blocks / scales[:, None], torch.tensor(NF4, dtype=torch.float64)) < 1e-5
    centred = in_blocks(scales - scales.mean(), 256)
    largest = centred.abs().amax(1)
    assert torch.allclose(layer.scales.view(torch.float32)[:-1].double(), largest, rtol=1e-5)
    assert float(layer.scales.view(torch.float32)[-1]) == pytest.approx(float(scales.mean()), rel=1e-6)
    last = len(scales) - 256 * (len(centred) - 1)  # the rest of the last block is padding
    of_scales[-1, last:] = centred[-1, last:] = 0
    assert farther(of_scales, centred / largest[:, None], dynamic_map()) < 1e-4


def source(tiny_model, kind="nf4", **more):
    return ModelSource(path=str(tiny_model), quantization=kind, **{"lora": LoraSettings(r=4), **more})


def stirred(model):
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def micro_batch():
    generator = torch.Generator().manual_seed(1)

    def ids(size):
        return torch.randint(0, 256, (size,), generator=generator)

    sizes = ((5, (7, 9)), (4, (12, 2)), (3, (1, 4)))
    examples = [Example(ids(p), tuple(Branch(ids(r), torch.ones(r)) for r in rs)) for p, rs in sizes]
    return pack(examples, list(range(3)), StepTotals(35.0, 3))


def loss_of(model, batch):
    return token_loss(model, batch, lambda stats, part: -(stats.logps * part.scored.weights).sum())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- what packed weights stand for


@EACH_KIND
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_stands_for_the_values_that_the_papers_give(kind, dtype, tiny_model):
    plain = load_causal_lm(ModelSource(path=str(tiny_model), dtype=dtype))
    packed = dict(quantized_layers(load_causal_lm(source(tiny_model, kind, dtype=dtype))))
    assert len(packed) == 14
    for name, layer in packed.items():
        weight = plain.get_parameter(plain_name(f"{name}.weight")).detach()
        check_layer(layer, weight.double())


def packed_layer(weight, kind, **more):
    """A layer of its own, quantised as `from_pretrained` would."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    rows, columns = weight.shape
    if kind == "nf4":
        layer = Linear4bit(columns, rows, bias=False, compress_statistics=False, quant_type="nf4")
    else:
        layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    layer.weight.data = weight.clone()
    layer.to("cpu")
    own = QuantizedLinear(columns, rows, kind, **more)
    {"nf4": _take_nf4, "int8": _take_int8}[kind](own, layer)
    return own


def random_weight(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


@EACH_KIND
@pytest.mark.parametrize("shape", [(64, 32), (48, 96), (150, 130), (64, 640)], ids=str)
def test_a_matrix_of_any_shape_stands_for_what_the_papers_give(kind, shape):
    """Blocks longer than a row, blocks over the end of a row, a last block that is not full, more than 256 blocks."""
    weight = random_weight(*shape)
    check_layer(packed_layer(weight, kind), weight.double())


@EACH_KIND
def test_a_layer_has_the_product_and_the_gradient_of_its_matrix(kind):
    layer, x = packed_layer(random_weight(48, 96), kind), torch.randn(5, 96, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    want = plain.double() @ decoded(layer).T
    want.square().sum().backward()
    got = layer(x)
    got.square().sum().backward()
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(x.grad, plain.grad, rtol=1e-4, atol=1e-4 * float(plain.grad.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


@EACH_KIND
@pytest.mark.parametrize("transposed", [False, True])
def test_a_plain_state_has_the_matrix_as_the_architecture_keeps_it(kind, transposed):
    holder = torch.nn.Module()
    holder.part = packed_layer(random_weight(48, 96), kind, transposed=transposed)
    state = dequantized_state(holder, holder.state_dict(), torch.float32)
    want = decoded(holder.part).T if transposed else decoded(holder.part)
    assert set(state) == {"part.weight"}
    assert torch.allclose(state["part.weight"].double(), want, rtol=1e-6, atol=1e-6)


@EACH_KIND
def test_bfloat16_is_rounded_once(kind, tiny_model):
    layer = next(layer for _, layer in quantized_layers(load_causal_lm(source(tiny_model, kind))))
    assert torch.equal(layer.dequantized(torch.bfloat16), layer.dequantized(torch.float32).bfloat16())


def test_packed_weights_do_not_depend_on_the_number_of_threads(tiny_model):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(2)
    layer = Linear4bit(4096, 1024, bias=False, compress_statistics=False, quant_type="nf4").to("cpu")
    made, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            own = QuantizedLinear(4096, 1024, "nf4")
            _take_nf4(own, layer)
            made.append(fingerprint(own))
    finally:
        torch.set_num_threads(threads)
    assert len(set(made)) == 1


# -- computing with them


def twins(tiny_model, kind, **more):
    """A model with packed weights, and a plain one whose weights are those that the packed ones stand for."""
    packed = stirred(load_causal_lm(source(tiny_model, kind, **more)))
    plain = load_causal_lm(ModelSource(path=str(tiny_model), lora=LoraSettings(r=4), **more))
    state = {k: v for k, v in packed.state_dict().items() if "scales" not in k and v.is_floating_point()}
    for name, layer in quantized_layers(packed):
        state[f"{name}.weight"] = layer.dequantized(layer_dtype(packed))
    plain.load_state_dict(state)
    return packed, plain


def layer_dtype(model):
    return base_model(model).dtype


@EACH_KIND
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_plain_model(kind, dtype, checkpointing, tiny_model):
    models = twins(tiny_model, kind, dtype=dtype, gradient_checkpointing=checkpointing)
    losses = [loss_of(model, micro_batch()) for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    got, want = map(gradients, models)
    assert got.keys() == want.keys() and len(got) == 28
    assert all(".lora_" in name and float(value.norm()) > 0 for name, value in got.items())
    assert all(torch.equal(got[name], value) for name, value in want.items())


@EACH_KIND
def test_autocast_computes_in_16_bits_as_a_plain_layer_does(kind, tiny_model):
    models = twins(tiny_model, kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(model, micro_batch()) for model in models]
    for loss in losses:
        loss.backward()
    got, want = map(gradients, models)
    assert torch.allclose(*losses, rtol=1e-3)
    layer = next(layer for _, layer in quantized_layers(models[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, layer.in_features)).dtype == torch.bfloat16
    assert all(torch.allclose(got[n], w, rtol=0.1, atol=0.05 * float(w.abs().max())) for n, w in want.items())


@EACH_KIND
def test_training_and_evaluation_give_the_same_and_so_do_neighbours(kind, tiny_model):
    """LLM.int8() looks for outlier columns over the micro-batch; in evaluation bitsandbytes may compute in bfloat16."""
    model, batch = load_causal_lm(source(tiny_model, kind, dtype="float32")), micro_batch()
    layer = next(layer for _, layer in quantized_layers(model))
    with evaluating(model), torch.no_grad():
        evaluated = token_logps(model, batch)
    assert torch.equal(token_logps(model, batch).detach(), evaluated)
    rows = torch.randn(6, layer.in_features)
    rows[5] *= 100  # an outlier in another example
    alone, beside = layer(rows[:4]), layer(rows)[:4]
    assert torch.allclose(alone, beside, rtol=1e-6, atol=1e-6)
    assert torch.equal(fresh_weight(layer), fresh_weight(layer.eval()))


def fresh_weight(layer):
    return layer.weight.detach().clone()


@EACH_KIND
def test_the_reference_is_the_policy_at_its_start_exactly(kind, tiny_model):
    policy, batch = load_causal_lm(source(tiny_model, kind)), micro_batch()
    before = token_logps(policy, batch).detach()
    with reference_mode(policy):
        assert torch.equal(token_logps(policy, batch), before)
    stirred(policy)
    with reference_mode(policy):
        assert torch.equal(token_logps(policy, batch), before)
    assert not torch.equal(token_logps(policy, batch).detach(), before)


def test_heads_and_embeddings_are_as_they_were(tiny_model, tmp_path):
    untied = AutoModelForCausalLM.from_pretrained(tiny_model)
    untied.config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(untied.config)
    untied.save_pretrained(tmp_path)
    for folder, tied in ((tiny_model, True), (tmp_path, False)):
        model = base_model(load_causal_lm(source(folder)))
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        assert is_plain_linear(head) and head.weight.dtype == torch.float32
        assert (head.weight is table.weight) == tied
        assert torch.equal(head.weight, AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight)


@EACH_KIND
def test_a_scalar_model_keeps_its_head_in_float32(kind, tiny_model):
    model = load_scalar_model(source(tiny_model, kind, dtype="bfloat16"), "reward_model")
    assert len(list(quantized_layers(model))) == 14 and quantization_of(model) == kind
    heads = [m for m in model.modules() if isinstance(m, ScalarHead)]
    assert {head.weight.dtype for head in heads} == {torch.float32}
    stirred(model)
    scalar_at_ends(model, micro_batch()).square().sum().backward()
    assert base_model(model).score.modules_to_save.default.weight.grad.norm() > 0


@EACH_KIND
def test_a_frozen_network_needs_no_adapters(kind, tiny_model):
    model = load_causal_lm(source(tiny_model, kind, lora=None).frozen(), "reference")
    assert quantization_of(model) == kind and torch.isfinite(token_logps(model, micro_batch())).all()


@pytest.mark.slow
@EACH_KIND
def test_compiled_layers_give_the_same(kind, tiny_model):
    plain, compiled = (load_causal_lm(source(tiny_model, kind, compile=c)) for c in (False, True))
    compiled.load_state_dict(stirred(plain).state_dict())
    losses = [loss_of(model, micro_batch()) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-6)
    got, want = gradients(compiled), gradients(plain)
    assert all(torch.allclose(got[n], w, rtol=1e-4, atol=1e-6 * float(w.abs().max())) for n, w in want.items())


def test_gpt_2_has_its_matrices_the_other_way_round(bare_model):
    packed = load_causal_lm(source(bare_model))
    plain = load_causal_lm(ModelSource(path=str(bare_model)))
    layers = dict(quantized_layers(packed))
    assert layers and all(layer.transposed for layer in layers.values())
    for name, layer in layers.items():
        weight = plain.get_parameter(plain_name(f"{name}.weight")).detach()
        check_layer(layer, weight.T.double())


# -- moving, copying, casting


@EACH_KIND
def test_casts_and_moves_leave_packed_weights_alone(kind, tiny_model):
    model = load_causal_lm(source(tiny_model, kind))
    layer = next(layer for _, layer in quantized_layers(model))
    before, copied = layer.dequantized(torch.float32), copy.deepcopy(layer)
    assert torch.equal(copied.dequantized(torch.float32), before) and copied.weight is not layer.weight
    model.to(torch.bfloat16)  # as precision bf16-true does
    assert torch.equal(layer.dequantized(torch.float32), before)
    assert layer(torch.randn(2, layer.in_features).bfloat16()).dtype == torch.bfloat16
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # as a move to another device does
    try:
        model.to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    assert torch.equal(layer.dequantized(torch.float32), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH_KIND
def test_a_gpu_computes_with_the_same_weights(kind, tiny_model):
    model = stirred(load_causal_lm(source(tiny_model, kind)))
    batch = micro_batch()
    on_cpu, name = loss_of(model, batch), base_fingerprint(model)
    model.to("cuda")
    on_gpu = loss_of(model, batch.to("cuda"))
    assert base_fingerprint(model) == name
    assert torch.allclose(on_gpu.cpu(), on_cpu, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH_KIND
def test_a_gpu_does_not_hold_the_exported_matrices_of_a_packed_base(kind, tiny_model):
    model = stirred(load_causal_lm(source(tiny_model, kind))).to("cuda")
    matrices = {f"{plain_name(f'{name}.weight')}" for name, _ in quantized_layers(model)}
    state = merged_state(model, "cpu")
    assert matrices <= state.keys() and all(state[name].device.type == "cpu" for name in matrices)


# -- fingerprints


@EACH_KIND
def test_the_fingerprint_is_of_what_the_weights_are_packed_in(kind, tiny_model):
    first, second = (load_causal_lm(source(tiny_model, kind)) for _ in range(2))
    name = base_fingerprint(first)
    assert base_fingerprint(second) == name
    assert base_fingerprint(stirred(second)) == name
    assert fingerprint(load_causal_lm(source(tiny_model, kind, lora=None))) == name
    others = [source(tiny_model, other) for other in (*KINDS, None) if other != kind]
    assert name not in {base_fingerprint(load_causal_lm(other)) for other in others}
    parts = {"weight", "scales"} | ({"block_scales"} if kind == "nf4" else set())
    for part in parts:
        _, layer = next(iter(quantized_layers(first)))
        layer.get_parameter(part).data.view(-1)[0] ^= 1
        assert base_fingerprint(first) != name
        layer.get_parameter(part).data.view(-1)[0] ^= 1
    assert base_fingerprint(first) == name


# -- memory


@EACH_KIND
def test_the_plan_counts_the_bytes_that_are_there(kind, tiny_model):
    for load, form in ((load_causal_lm, "causal"), (load_scalar_model, "scalar")):
        real, planned = load(source(tiny_model, kind)), meta_network(source(tiny_model, kind), form)

        def sizes(model):
            return {n: (p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()}

        assert sizes(real) == sizes(planned)
        assert weight_count(real) == weight_count(planned) == weight_count(load(source(tiny_model, None)))


@EACH_KIND
def test_bytes_of_a_weight(kind, tiny_model):
    """4 bits, 8 for a scale of 64, 32 for a scale of 256 scales; or 8 bits and 32 for a row."""
    layer = QuantizedLinear(1024, 512, kind)
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    number = 1024 * 512
    want = number // 2 + number // 64 + 4 * (number // 64 // 256) + 4 if kind == "nf4" else number + 4 * 512
    assert size == want
    assert size / number == pytest.approx({"nf4": 0.5159, "int8": 1.0039}[kind], abs=1e-4)


def storages(model):
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    found |= {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in model.buffers()}
    return sum(found.values())


@EACH_KIND
def test_planned_bytes_are_those_of_the_storages(kind, tiny_model):
    real, planned = load_causal_lm(source(tiny_model, kind)), meta_network(source(tiny_model, kind), "causal")
    tables = sum(t.untyped_storage().nbytes() for t in _tables(torch.device("cpu")))
    bytes_planned = sum(p.numel() * p.element_size() for p in planned.parameters())
    assert bytes_planned == pytest.approx(storages(real) + tables, rel=0.02)


@pytest.mark.slow
@pytest.mark.smollm
@EACH_KIND
def test_planned_bytes_of_a_real_model_are_those_of_its_storages(kind, smollm):
    settings = ModelSource(path=str(smollm), quantization=kind, dtype="bfloat16", lora=LoraSettings(r=16))
    tables = sum(t.untyped_storage().nbytes() for t in _tables(torch.device("cpu")))
    found = storages(load_causal_lm(settings)) + tables
    planned = weights_of(meta_network(settings, "causal"))
    assert planned.total_bytes == pytest.approx(found, rel=0.02)
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    others = 2 * (134_515_008 - matrices)
    assert planned.frozen_bytes - others == pytest.approx(matrices * {"nf4": 0.5159, "int8": 1.0053}[kind], rel=1e-3)


# -- what is refused


@pytest.mark.parametrize(
    "change, said",
    [
        ({"quantization": "fp3"}, r"policy\.quantization: expected one of nf4, int8, or null; got 'fp3'"),
        ({"lora": None}, r"policy\.quantization: weights in nf4 cannot be trained .*policy\.lora"),
        ({"dtype": "float64"}, r"policy\.quantization: .* policy\.dtype to float32 or bfloat16"),
        (
            {"path": None, "config": {"model_type": "llama"}, "tokenizer": "x"},
            r"from scratch .* leave quantization out",
        ),
        ({"gguf_file": "model.gguf", "path": "org/model"}, r"GGUF .* export --checkpoint"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(change, said, tiny_model):
    made = ModelSource(**{"path": str(tiny_model), "quantization": "nf4", "lora": LoraSettings(), **change})
    with pytest.raises(ValueError, match=said):
        made.validate("policy", trained=True)


def test_shards_are_refused(tiny_model):
    with building_in_shards(Sharding(mesh=None)), pytest.raises(ValueError, match=r"fsdp2.*use strategy ddp"):
        load_causal_lm(source(tiny_model), "policy")


def test_an_adapter_folder_is_refused(tiny_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_adapters(base, LoraSettings(r=2), "causal").save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"policy\.quantization: .* holds an adapter.*merge_lora=true"):
        load_causal_lm(source(tmp_path), "policy")


def test_weights_that_are_quantised_already_are_refused(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=bnb_config("nf4"), device_map="cpu")
    model.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"policy\.quantization: .* quantised already; give the model"):
        load_causal_lm(source(tmp_path), "policy")
    with pytest.raises(ValueError, match=r"policy\.path: .* quantised already .* nf4 or int8"):
        load_causal_lm(ModelSource(path=str(tmp_path)), "policy")


def test_without_bitsandbytes_it_says_what_is_missing(tiny_model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"policy\.quantization: nf4 needs bitsandbytes.*pip install"):
        load_causal_lm(source(tiny_model), "policy")


def test_the_share_of_quantised_weights_is_told(tiny_model, monkeypatch):
    messages = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", messages.append)
    model = load_causal_lm(source(tiny_model, "int8"), "policy")
    packed = sum(layer.in_features * layer.out_features for _, layer in quantized_layers(model))
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = packed / (weight_count(model) - adapters)
    assert messages == [f"policy: 14 matrices in int8, {share:.0%} of its weights"]


def test_shapes_alone_know_what_is_quantised(tiny_model):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    quantize_shapes(model, "nf4")
    real = load_causal_lm(source(tiny_model, lora=None).frozen())
    assert {n for n, _ in quantized_layers(model)} == {n for n, _ in quantized_layers(real)}


@EACH_KIND
def test_merged_weights_are_what_was_trained(kind, tiny_model):
    packed, plain = twins(tiny_model, kind)
    got, want = merged_state(packed), merged_state(plain)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
