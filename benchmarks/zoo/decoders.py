"""Language models of transformers that predict the next token: attention of many kinds, mixtures of experts, recurrences."""

import functools
from typing import Any

import transformers
from torch import nn

from benchmarks.zoo.entries import HEADS, HIDDEN, LAYERS, TOKENS, VOCABULARY, WIDE, Entry, padded_text, text

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


def _causal(config: str, model: str, drop: tuple[str, ...] = (), **settings: Any) -> nn.Module:
    """`model` of transformers with a small `config`; `drop` are sizes that the config calls by another name."""
    sizes = {name: value for name, value in _SIZES.items() if name not in drop}
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **settings}))
    return made


def _llama() -> nn.Module:
    return _causal("LlamaConfig", "LlamaForCausalLM")


def _mistral() -> nn.Module:
    return _causal("MistralConfig", "MistralForCausalLM", sliding_window=5)


def _qwen3() -> nn.Module:
    return _causal("Qwen3Config", "Qwen3ForCausalLM", head_dim=8, tie_word_embeddings=True)


def _gemma2() -> nn.Module:
    return _causal("Gemma2Config", "Gemma2ForCausalLM", head_dim=8, sliding_window=5)


def _gemma3() -> nn.Module:
    return _causal("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, sliding_window=5)


def _phi3() -> nn.Module:
    return _causal("Phi3Config", "Phi3ForCausalLM")


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": TOKENS}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, use_cache=False))


def _neox() -> nn.Module:
    return _causal("GPTNeoXConfig", "GPTNeoXForCausalLM")


def _opt() -> nn.Module:
    sizes: dict[str, Any] = {"ffn_dim": WIDE, "word_embed_proj_dim": HIDDEN}
    return _causal("OPTConfig", "OPTForCausalLM", ("num_key_value_heads", "intermediate_size"), **sizes)


def _bloom() -> nn.Module:
    sizes: dict[str, Any] = {"n_layer": LAYERS, "hidden_size": HIDDEN, "n_head": HEADS, "vocab_size": VOCABULARY}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, hidden_dropout=0.1, use_cache=False))


def _falcon() -> nn.Module:
    return _causal("FalconConfig", "FalconForCausalLM", ("num_key_value_heads", "intermediate_size"), ffn_hidden_size=WIDE)


def _mixtral() -> nn.Module:
    return _causal("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> nn.Module:
    sizes: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return _causal("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **sizes)


def _deepseek_v3() -> nn.Module:
    attention: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
    sizes: dict[str, Any] = {"first_k_dense_replace": 1, "num_key_value_heads": HEADS}
    return _causal("DeepseekV3Config", "DeepseekV3ForCausalLM", **attention, **experts, **sizes)


def _gpt_oss() -> nn.Module:
    return _causal("GptOssConfig", "GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=5)


def _mamba() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False))


def _mamba2() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8}
    heads: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    config = transformers.Mamba2Config(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False)
    return transformers.Mamba2ForCausalLM(config)


def _rwkv() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "context_length": TOKENS}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, attention_hidden_size=HIDDEN, use_cache=False))


def _recurrent_gemma() -> nn.Module:
    sizes: dict[str, Any] = {
        "lru_width": HIDDEN,
        "attention_window_size": 6,
        "head_dim": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    }
    return _causal("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", ("max_position_embeddings",), **sizes)


def _olmo2() -> nn.Module:
    return _causal("Olmo2Config", "Olmo2ForCausalLM")


def _smollm3() -> nn.Module:
    return _causal("SmolLM3Config", "SmolLM3ForCausalLM")


DECODERS = (
    Entry("Llama", "grouped heads, SwiGLU", _llama, text),
    Entry("Mistral", "sliding window, padded batch", _mistral, padded_text),
    Entry("Qwen3", "normalised queries and keys, tied head", _qwen3, text),
    Entry("Gemma-2", "soft caps, sliding and full attention in turn", _gemma2, text),
    Entry("Gemma-3", "sliding and full attention, four norms a block", _gemma3, text),
    Entry("Phi-3", "fused query-key-value and gate-up", _phi3, text),
    Entry("OLMo-2", "norms behind the sublayers", _olmo2, text),
    Entry("SmolLM3", "layers without rotary positions", _smollm3, text),
    Entry("GPT-2", "Conv1D layers, learned positions, tied head, dropout", _gpt2, text),
    Entry("GPT-NeoX", "attention and MLP side by side", _neox, text),
    Entry("OPT", "learned positions with an offset, dropout", _opt, padded_text),
    Entry("BLOOM", "ALiBi, norm behind the embedding, dropout", _bloom, text),
    Entry("Falcon", "one key-value head, parallel attention", _falcon, text),
    Entry("Mixtral", "3-D expert weights, 2 of 4 experts", _mixtral, text),
    Entry("Qwen3-MoE", "3-D expert weights, normalised routing", _qwen3_moe, text),
    Entry("DeepSeek-V3", "latent attention (MLA), grouped routing, a shared expert", _deepseek_v3, text),
    Entry("GPT-OSS", "experts with biases, attention sinks", _gpt_oss, text),
    Entry("Mamba", "selective scan, depthwise convolution", _mamba, text),
    Entry("Mamba-2", "chunked scan with per-head parameters", _mamba2, text),
    Entry("RWKV", "time mixing and decay, a recurrence", _rwkv, functools.partial(text, tokens=6)),  # dozens of calls for every token
    Entry("RecurrentGemma", "gated linear recurrence, block-diagonal gates", _recurrent_gemma, text),
)
