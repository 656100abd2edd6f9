"""A GGUF file, written here with the format's own package, becomes a model that can be trained and saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_align.models.export import export_module
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.models.tokens import load_tokenizer

HEADS, KEY_HEADS, WIDTH, LAYERS = 4, 2, 32, 2
TEXT = "a headache 头痛 x = 3.14\n"
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensor_name(name: str) -> str:
    name = name.removesuffix(".weight").replace("model.layers.", "blk.")
    for own, theirs in TENSORS.items():
        name = name.replace(own, theirs)
    return f"{name}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The format keeps the two halves of each rotary pair next to each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_vocabulary(writer: GGUFWriter, tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab", "cd"]
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Llama in 8-bit blocks, and the weights that the blocks stand for."""
    size = len(AutoTokenizer.from_pretrained(tiny_model)) + 2  # and the merges
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = HEADS, KEY_HEADS, WIDTH // HEADS
    config.tie_word_embeddings = True
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    write_vocabulary(writer, tiny_model)
    expected = {}
    for name, tensor in LlamaForCausalLM(config).model.named_parameters(prefix="model"):
        weight = tensor.detach().numpy()
        if weight.ndim == 1:
            writer.add_tensor(tensor_name(name), weight)
            expected[name] = tensor.detach()
            continue
        blocks = quants.quantize(weight, GGMLQuantizationType.Q8_0)
        expected[name] = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q8_0))
        if "q_proj" in name or "k_proj" in name:
            blocks = quants.quantize(
                interleaved(weight, HEADS if "q_proj" in name else KEY_HEADS), GGMLQuantizationType.Q8_0
            )
        writer.add_tensor(tensor_name(name), blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def test_its_blocks_become_plain_weights_that_can_be_trained(written: tuple) -> None:
    path, expected = written
    model = load_causal_lm(ModelSource(path=str(path)))
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].detach(), weight, rtol=0, atol=1e-7)
    assert model.config._attn_implementation == "packed"
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_folder_and_file_name_say_the_same_as_the_path(written: tuple) -> None:
    path, _ = written
    source = ModelSource(path=str(path.parent), gguf_file=path.name, dtype="bfloat16", lora=LoraSettings(r=2))
    model = load_causal_lm(source)
    assert model.get_base_model().dtype == torch.bfloat16
    tokenizer = load_tokenizer(source)
    assert tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|pad|>")


def test_it_is_saved_as_an_ordinary_folder(written: tuple, tmp_path: Path) -> None:
    source = ModelSource(path=str(written[0]))
    model, tokenizer = load_causal_lm(source).eval(), load_tokenizer(source)
    export_module(model, tokenizer, tmp_path / "hf")
    assert "gguf" not in (tmp_path / "hf" / "config.json").read_text()
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokens.decode(tokens(TEXT).input_ids) == TEXT
    inputs = {"input_ids": torch.tensor([tokens(TEXT).input_ids])}
    torch.testing.assert_close(read_back(**inputs).logits, model(**inputs).logits, rtol=1e-6, atol=1e-6)


def test_a_reward_model_may_start_from_it(written: tuple) -> None:
    path, expected = written
    model = load_scalar_model(ModelSource(path=str(path)))
    for name, parameter in model.model.named_parameters(prefix="model"):
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-7)
    assert model.score.weight.dtype == torch.float32
