"""Well-known models by name, as the transformers configs that their publishers put beside the weights.

Written down from the `config.json` of each repository on huggingface.co, without what does not change shapes or the graph. `parameters`
is the published count, which the tests compare with the model that the config builds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A config without weights. `repository` is where its `config.json` was read."""

    name: str
    repository: str
    model_type: str
    parameters: int
    settings: Mapping[str, Any]


def _llama(**settings: Any) -> dict[str, Any]:
    return {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, **settings}


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, "vocab_size": 50257, "tie_word_embeddings": True}


def _qwen3(**settings: Any) -> dict[str, Any]:
    shared = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
    return {**shared, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", **settings}


_ALL = (
    Preset(
        "llama-2-7b",
        "meta-llama/Llama-2-7b-hf",
        "llama",
        6_738_415_616,
        _llama(
            hidden_size=4096,
            intermediate_size=11_008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32_000,
            max_position_embeddings=4096,
        ),
    ),
    Preset(
        "llama-3-8b",
        "meta-llama/Meta-Llama-3-8B",
        "llama",
        8_030_261_248,
        _llama(
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128_256,
            max_position_embeddings=8192,
            rope_theta=500_000.0,
        ),
    ),
    Preset(
        "llama-3-70b",
        "meta-llama/Meta-Llama-3-70B",
        "llama",
        70_553_706_496,
        _llama(
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128_256,
            max_position_embeddings=8192,
            rope_theta=500_000.0,
        ),
    ),
    Preset(
        "qwen3-0.6b",
        "Qwen/Qwen3-0.6B",
        "qwen3",
        596_049_920,
        _qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True),
    ),
    Preset(
        "qwen3-8b",
        "Qwen/Qwen3-8B",
        "qwen3",
        8_190_735_360,
        _qwen3(hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=False),
    ),
    Preset(
        "gemma-3-1b",
        "google/gemma-3-1b-pt",
        "gemma3_text",
        999_885_952,
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262_144,
            "max_position_embeddings": 32_768,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
        },
    ),
    Preset(
        "mistral-7b",
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        7_241_732_096,
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32_000,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    Preset("gpt2", "openai-community/gpt2", "gpt2", 124_439_808, _gpt2(12, 768, 12)),
    Preset("gpt2-medium", "openai-community/gpt2-medium", "gpt2", 354_823_168, _gpt2(24, 1024, 16)),
    Preset("gpt2-large", "openai-community/gpt2-large", "gpt2", 774_030_080, _gpt2(36, 1280, 20)),
    Preset("gpt2-xl", "openai-community/gpt2-xl", "gpt2", 1_557_611_200, _gpt2(48, 1600, 25)),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
"""Every preset by its name."""
