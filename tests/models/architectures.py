"""Tiny random networks of many architectures, and what each sequence alone gives in them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.batch import Branch, Example
from lit_align.models.load import set_attention

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | NO_DROPOUT
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
STATE = {"state_size": 4, "conv_kernel": 3, "expand": 2, "time_step_rank": 4}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
}


class Architecture(NamedTuple):
    """One row of docs/architectures.md.

    Attributes:
        name: For people.
        model_type: For transformers.
        options: Beside COMMON.
        packed: Whether it takes packed rows; else they are padded before its trunk.
        own: The attention of transformers that it is compared with.
        limit: Of the relative difference of gradients, in float64; a tenth of it for log-probabilities.
    """

    name: str
    model_type: str
    options: Mapping[str, Any] = MappingProxyType({})
    packed: bool = True
    own: str = "eager"
    limit: float = 1e-12


ARCHITECTURES = [
    Architecture("Llama", "llama"),
    Architecture("Llama, tied embeddings, biases", "llama", {"tie_word_embeddings": True, "attention_bias": True}),
    Architecture("Qwen2", "qwen2"),
    Architecture(
        "Qwen2, sliding window", "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    ),
    Architecture("Qwen3", "qwen3"),
    Architecture(
        "Qwen2-MoE, sliding window",
        "qwen2_moe",
        MOE
        | {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "shared_expert_intermediate_size": 24,
        },
    ),
    Architecture("Qwen3-MoE", "qwen3_moe", MOE),
    Architecture("Mistral, sliding window", "mistral", {"sliding_window": 5}),
    Architecture("Mixtral", "mixtral", MOE),
    Architecture("Gemma", "gemma"),
    Architecture(
        "Gemma 2, soft-capped, sliding window",
        "gemma2",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
            "attention_dropout": 0.0,
        },
    ),
    Architecture(
        "VaultGemma, soft-capped",
        "vaultgemma",
        {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    ),
    Architecture("Gemma 3 (text), sliding window", "gemma3_text", {"sliding_window": 5}),
    Architecture("Phi", "phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    Architecture(
        "Phi-3",
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_window": 6} | NO_DROPOUT,
    ),
    Architecture("GPT-2", "gpt2", SMALL_GPT2),
    Architecture("GPT-BigCode", "gpt_bigcode", SMALL_GPT2),
    Architecture("GPT-NeoX", "gpt_neox"),
    Architecture("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo2", "olmo2"),
    Architecture("OLMo3, sliding window", "olmo3", {"sliding_window": 4}),
    Architecture(
        "Granite", "granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7}
    ),
    Architecture("Cohere", "cohere"),
    Architecture("Cohere2, sliding window", "cohere2", {"sliding_window": 4}),
    Architecture("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}),
    Architecture("StarCoder2", "starcoder2", {"sliding_window": 4, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    Architecture("Nemotron", "nemotron", {}, False),
    Architecture("GLM", "glm", {"partial_rotary_factor": 0.5}),
    Architecture("GLM4", "glm4", {"partial_rotary_factor": 0.5}),
    Architecture("Ministral, sliding window", "ministral", {"sliding_window": 4}),
    Architecture("Helium", "helium"),
    Architecture("ERNIE 4.5", "ernie4_5"),
    Architecture("Hunyuan (dense)", "hunyuan_v1_dense"),
    Architecture("EXAONE 4, sliding window", "exaone4", {"sliding_window": 4, "sliding_window_pattern": 2}),
    Architecture(
        "DeepSeek-V3",
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "head_dim": None,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
    Architecture("StableLM", "stablelm", {}, False),
    Architecture("Falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}, False),
    Architecture("BLOOM (ALiBi)", "bloom", {"n_layer": 2, "n_head": 4}, False),
    Architecture("GPT-J", "gptj", SMALL_GPT2 | {"rotary_dim": 4}, False),
    Architecture(
        "GPT-Neo",
        "gpt_neo",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "intermediate_size": 48,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
        },
        False,
    ),
    Architecture(
        "GPT-OSS (sinks)",
        "gpt_oss",
        MOE | {"sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        False,
    ),
    Architecture(
        "PhiMoE, sliding window",
        "phimoe",
        MOE | {"sliding_window": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
        False,
        "sdpa",
    ),
    Architecture("Mamba", "mamba", STATE, False),
    Architecture("Mamba 2", "mamba2", STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, False),
    Architecture(
        "RecurrentGemma",
        "recurrent_gemma",
        {
            "lru_width": 32,
            "attention_window_size": 6,
            "block_types": ["recurrent", "attention"],
            "attention_dropout": 0.0,
            "logits_soft_cap": 1e6,
        },
        False,
        limit=1e-5,
    ),  # its recurrence is in float32 whatever it is asked
    Architecture("Qwen3-Next", "qwen3_next", MOE | LINEAR, False),
    Architecture(
        "LFM2 (convolutions)",
        "lfm2",
        {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        False,
    ),
    Architecture(
        "Jamba",
        "jamba",
        MOE
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        False,
    ),
    Architecture(
        "Falcon-H1",
        "falcon_h1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
        },
        False,
    ),
]


def build(architecture: Architecture, attention: str, dtype: torch.dtype = torch.float32):
    """The tiny network; equal weights whatever the attention."""
    torch.manual_seed(0)
    options = {name: value for name, value in {**COMMON, **architecture.options}.items() if value is not None}
    config = AutoConfig.for_model(architecture.model_type, **options)
    config._experts_implementation = "eager"  # the grouped products of experts have no float64
    own = architecture.own if attention == "packed" else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=own).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide what they should multiply
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float32).to(dtype))
    set_attention(model, attention)
    return model.eval()


def forest(generator: torch.Generator) -> list[Example]:
    """Pairs on prompts of 1, 7 and 11 tokens; some tokens are not trained."""

    def ids(n: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (n,), generator=generator)

    sizes = [(7, 8, 3), (1, 1, 9), (11, 2, 12)]
    return [
        Example(ids(prefix), tuple(Branch(ids(n), (torch.arange(n) % 4 != 2).float()) for n in branches))
        for prefix, *branches in sizes
    ]


def alone(model, examples: list[Example]) -> torch.Tensor:
    """Log-probability of each scored token, every sequence through the model by itself."""
    rows = []
    for example in examples:
        for branch in example.branches:
            ids, first = torch.cat([example.prefix_ids, branch.input_ids]), len(example.prefix_ids)
            logps = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            scored = [t for t in range(len(branch.input_ids)) if branch.weights[t] > 0]
            rows += [logps[first + t - 1, ids[first + t]] for t in scored]
    return torch.stack(rows)
