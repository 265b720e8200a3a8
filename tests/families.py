"""Tiny random models of many decoder families, none of which signbit names."""

import transformers as t

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _decoder(config, **changes):
    return t.AutoModelForCausalLM.from_config(config(**{**_SMALL, **changes})).eval()


def llama(**changes):
    return _decoder(t.LlamaConfig, num_key_value_heads=2, **changes)


def mistral(**changes):
    return _decoder(t.MistralConfig, num_key_value_heads=2, **changes)


def qwen3(**changes):
    return _decoder(t.Qwen3Config, num_key_value_heads=2, head_dim=8, **changes)


def gemma3(**changes):
    return _decoder(t.Gemma3TextConfig, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, **changes)


def phi(**changes):
    return _decoder(t.PhiConfig, **changes)


def gpt_neox(**changes):
    return _decoder(t.GPTNeoXConfig, **changes)


def gpt2():
    config = t.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return t.AutoModelForCausalLM.from_config(config).eval()


def _opt(**changes):
    sizes = {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return t.AutoModelForCausalLM.from_config(t.OPTConfig(**{**sizes, **changes})).eval()


def opt(**changes):
    return _opt(word_embed_proj_dim=32, **changes)


def opt_350m():
    """The form of opt-350m: projected embeddings and norms after the residual."""
    return _opt(word_embed_proj_dim=16, do_layer_norm_before=False)


def qwen3_moe():
    return _decoder(
        t.Qwen3MoeConfig,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


def mixtral():
    return _decoder(t.MixtralConfig, num_key_value_heads=2, num_local_experts=4)


def gpt_oss():
    """Experts with biases, stored transposed and interleaved, and a gate of their own."""
    return _decoder(
        t.GptOssConfig, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


#: Family → (model, linears a block has).
DENSE = {
    "llama": (llama, 7),
    "mistral": (mistral, 7),
    "qwen3": (qwen3, 7),
    "gemma3": (gemma3, 7),
    "phi": (phi, 6),
    "gpt_neox": (gpt_neox, 4),
    "gpt2": (gpt2, 4),
    "opt": (opt, 6),
    "opt_350m": (opt_350m, 6),
}
MIXTURES = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "gpt_oss": gpt_oss}
