"""Tiny configurations of any class of transformers, by the names of its fields.

What a name cannot tell is in `OVERRIDES`, with the reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, SiglipVisionConfig

from support.models import V

# Set wherever a configuration has them: first the settings on which losses go wrong.
FORCED: dict[str, Any] = {
    "logit_scale": 0.25,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.5,
    "output_multiplier": 0.5,
    "logits_mup_width_multiplier": 3.0,
    "final_logit_softcapping": 1.5,
    "output_logit_soft_cap": 1.5,
    "logits_soft_cap": 1.5,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.5,
    "z_loss_coefficient": 0.5,
    "moe_loss_weight": 0.5,
    "mtp_loss_scaling_factor": 0.5,
    "lm_head_bias": True,
    "is_decoder": True,
    "use_cache": False,  # training needs none, and hybrids ask it for a layer of attention, which few layers may lack
    "image_grid_pinpoints": [[32, 32]],  # the resolutions an image is cut to tiles at
    "sparse_prediction": True,  # ModernBERT's: the head is called for labeled tokens alone
}

# What integers become, by the first pattern that fits the whole name of their field; any other is at most 32.
SIZES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_(size|offset)(_per_layer_input)?", V),
    (r".*(n|num)_(key_value|kv)_heads|kv_n_heads", 2),
    (r"mamba_(n|num)_heads|(n|num)_mamba_heads|mamba_n_heads", 8),
    (r".*heads?", 4),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 4),
    (r".*head_dim|.*dim_head|.*d_head|d_kv|kv_channels|attention_head_size", 8),
    (r"num_kv_shared_layers", 0),
    # four, for hybrids have one of each kind among them
    (r"(.*_)?(n|num)_(.*_)?layers?|layers|(en|de)coder_layers|.*depth|num_blocks|.*merger_times", 4),
    (r".*shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r".*(n|num)_(.*_)?experts|.*expert_num", 4),
    (r".*per_tok|moe_k|.*topk|.*top_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r".*chunk_(size|length)", 4),
    (r"n_positions|n_ctx|max_seq_len|context_length|max_.*positions|max_.*position_embeddings", 64),
    # an image of 32 x 32 is 4 x 4 patches, merged two by two
    (r"patch_size", 8),
    (r"patch_embed_hidden_size", 3 * 8 * 8),
    (r"num_patches", 16),
    (r"mm_tokens_per_image|latent_query_num", 4),
    (r"pooling_kernel_size|num_filters", 2),
]
# Fields that are None by default and must not be.
ABSENT = re.compile(
    r"n_(routed|shared)_experts|num_experts(_per_tok)?|n_group|topk_group|top_k_experts|head_dim|num_key_value_heads"
)
TOKEN = re.compile(r".*(token|start|end|newline|patch|bos|eos)(?<!layer_start)_(id|ids|index)")
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}  # of half a head of 8
_CODES = {i: 10 + i for i in range(32)}  # tokens of a picture's codes, below those of text_inputs
_READS_THE_FIRST = {"decoder_start_token_id": 0, "pad_token_id": 0, "decoder": {"add_cross_attention": True}}
_SHALLOW = {"depths": [1] * 7}
# What a configuration class needs beyond its fields' names, and why.
OVERRIDES: dict[str, dict[str, Any]] = {
    # read by the layers, not given by the class
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "UdopConfig": {"decoder_start_token_id": 0},
    # None by default, and no checkpoint is without
    "ChameleonConfig": {
        "vocabulary_map": {
            "<image>": 3,
            **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": n for i, n in _CODES.items()},
        }
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "DiffusionGemmaTextConfig": {"moe_intermediate_size": 32},
    "Emu3Config": {
        "vocabulary_map": {
            "<image>": 3,
            "<|extra_200|>": 4,
            **{f"<|visual token {i:06}|>": n for i, n in _CODES.items()},
        }
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "Step3p7TextConfig": {"sliding_window": 8},
    "XmodConfig": {"default_language": "en_XX"},
    # None by default, or too few for text_inputs
    "EsmConfig": {"vocab_size": V},
    "EsmcConfig": {"num_key_value_heads": 4, "vocab_size": V},
    "SpeechT5Config": {"vocab_size": V},
    # rotary sections are checked against the head, or have an entry a layer type
    "HYV4VLTextConfig": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _MROPE}},
    "Cosmos3EdgeTextConfig": {"rope_parameters": _MROPE},
    # its sections are of height, width and time, not time first
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    # lists that name layers, or have one entry a layer
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "MllamaVisionConfig": {"intermediate_layers_indices": [1, 2], "vision_output_dim": 3 * 32},
    "Molmo2AdapterConfig": {"vision_feature_layer": [2, 1]},
    "VipLlavaConfig": {"vision_feature_layers": [-2, -1]},
    # the shared attention is that of the first hybrid layer; the default has one among four
    "ZambaConfig": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    # sizes that have to fit another's: heads the expanded hidden size, factors the sequence, projectors merged patches
    "Apertus1p5Config": {"image_token_offset": 0, "audio_token_offset": 32},
    "AriaConfig": {"projector_patch_to_query_dict": {16: 8}},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [32, 32]},
    "Emu3VQVAEConfig": {"hidden_size": 128},
    "Glm5NextTextConfig": {"index_kpool": 2},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [[-2, 1], [-1, 2]],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "Llama4VisionConfig": {"intermediate_size": 128},
    "Mamba2Config": {"num_heads": 8},
    "Molmo2VisionConfig": {"image_size": [32, 32]},
    "MuseGlimmerConfig": {"out_hidden_size": 128},
    "MuseSparkConfig": {"out_hidden_size": 128},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "LEDConfig": {"attention_window": [8] * 4},
    "LongformerConfig": {"attention_window": [8] * 4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MoonshineStreamingEncoderConfig": {"sample_rate": 16000},  # of frames of 5 ms
    "NeoMMEConfig": {"head_dim": 16},
    "Nemotron3DiarizationConfig": {"chunk_length": 8, "chunk_left_context": 2, "chunk_right_context": 2},
    "NystromformerConfig": {"segment_means_seq_len": 12, "num_landmarks": 4, "conv_kernel_size": 5},
    "VibeVoiceAcousticTokenizerConfig": _SHALLOW,
    "VibeVoiceAcousticTokenizerEncoderConfig": _SHALLOW,
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 3200},
    "ReformerConfig": {
        "axial_pos_shape": (3, 4),
        "axial_pos_embds_dim": (8, 24),
        # it seeds its own random numbers, from the clock
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    # its layers of windows have sizes of their own, which are no fields
    "Dots3NoteTextConfig": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 32),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
        "swa_head_dim": 12,
    },
    # else it replaces its layers in its first call, and draws random numbers for the new ones
    "BigBirdConfig": {"attention_type": "original_full"},
    "BigBirdPegasusConfig": {"attention_type": "original_full"},
    # its own tower is one of timm's
    "FastVlmConfig": {"vision_config": SiglipVisionConfig},
    # drafts for another model, which has these
    "Gemma4AssistantConfig": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    # of two models, of which the second has to read the first
    "EncoderDecoderConfig": _READS_THE_FIRST,
    "SpeechEncoderDecoderConfig": _READS_THE_FIRST,
    "VisionEncoderDecoderConfig": _READS_THE_FIRST,
}


def tiny_config(kind: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """A configuration of a class with every size small; `given` are fields of the class."""
    values = {**dict(_small(kind)), **OVERRIDES.get(kind.__name__, {}), **given}
    for name, sub in _sub_kinds(kind):
        chosen = values.get(name, {})  # fields, or another class
        values[name] = tiny_config(chosen) if isinstance(chosen, type) else tiny_config(sub, **chosen)
    if "kv_lora_rank" in values:  # latent attention has as many heads of keys and values as of queries
        values["num_key_value_heads"] = values["num_attention_heads"]
        values["head_dim"] = values["qk_rope_head_dim"]
    config = kind(**values)
    if "rope_parameters" not in values:
        _split_rotation(config, **values)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # most checkpoints have it, and the inputs of a decoder start with it
    return config


def _split_rotation(config: Any, num_attention_heads: int = 0, head_dim: int = 0, **_: Any) -> None:
    """Rotary sections for time, height and width: the defaults in transformers' code are of a head of 128."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope and num_attention_heads:
        size = head_dim or config.hidden_size // num_attention_heads
        half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]


def _small(kind: type[PreTrainedConfig]) -> Iterator[tuple[str, Any]]:
    tokens = iter(range(len(_SPECIAL), V))
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # transformers' decorator makes them dataclasses
        name, value = field.name, field.default
        if name in FORCED:
            yield name, FORCED[name]
        elif name in _SPECIAL:
            yield name, _SPECIAL.index(name)
        elif TOKEN.fullmatch(name) and (value is None or _is_size(value)):
            yield name, next(tokens)
        elif _is_size(value):
            yield name, size_of(name, value)
        elif isinstance(value, (tuple, list)) and value and all(map(_is_size, value)):
            yield name, type(value)(size_of(name, v) for v in value)
        elif value is None and ABSENT.fullmatch(name):
            yield name, size_of(name, 32)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def size_of(name: str, value: int) -> int:
    """What an integer field of this name and default becomes."""
    return min(value, next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), 32))


def _sub_kinds(kind: type[PreTrainedConfig]) -> Iterator[tuple[str, type[PreTrainedConfig]]]:
    """The configurations inside one, without the optional ones: only vision, so no audio beside it."""
    for name, spec in (getattr(kind, "sub_configs_defaults", None) or kind.sub_configs).items():
        sub = getattr(spec, "config_class", spec)
        if name == "vision_config" or not getattr(spec, "optional", False):
            yield name, sub if issubclass(sub, PreTrainedConfig) else CONFIG_MAPPING[spec.model_type]
