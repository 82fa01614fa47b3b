"""Every causal LM and image-text model of the installed transformers, tiny and random, stock against patched.

No class is listed: transformers' own mappings name them, and a configuration is made small by the names of its fields.
What a name cannot tell is in `OVERRIDES`, with the reason. `python tests/zoo.py` writes the table of all verdicts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from models import V, assert_same_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    SiglipVisionConfig,
    set_seed,
)
from transformers.models.auto import modeling_auto

from hf_xent.patching import patch, seam_of, unpatch

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "models.md"
MAPPINGS: dict[str, tuple[Any, Any]] = {
    "causal LM": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
CASES = [(mapping, model_type) for mapping, (_, names) in MAPPINGS.items() for model_type in names]
STATUSES = ("streamed", "materialized", "refused", "not run", "not built")
LACKS_PACKAGE = "ImportError"  # in the note of a class that needs a package this machine lacks

# Settings on which losses go wrong, set wherever a configuration has them.
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
    "image_grid_pinpoints": [[32, 32]],
    "use_cache": False,  # a cache asks for layers of attention, of which two layers may have none
}

# What integers become, by the first pattern that fits the whole name of their field; any other is at most 32.
SIZES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_per_layer_input)?", V),
    (r".*(n|num)_(key_value|kv)_heads|kv_n_heads", 2),
    (r"mamba_(n|num)_heads|(n|num)_mamba_heads|mamba_n_heads", 8),
    (r".*heads?", 4),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 4),
    (r".*head_dim|.*dim_head|.*d_head|d_kv|kv_channels|attention_head_size", 8),
    (r"num_kv_shared_layers", 0),
    (r"vocab_offset", V),
    (r"(.*_)?(n|num)_(.*_)?layers?|layers|(en|de)coder_layers|.*depth|num_blocks|.*merger_times", 4),  # hybrids have one of each kind
    (r".*shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r".*(n|num)_(.*_)?experts|.*expert_num", 4),
    (r".*per_tok|moe_k|.*topk|.*top_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r".*chunk_(size|length)", 4),
    (r"n_positions|n_ctx|max_seq_len|context_length|max_.*positions|max_.*position_embeddings", 64),
    (r"patch_size", 8),
    (r"num_patches", 16),
    (r"mm_tokens_per_image|latent_query_num", 4),
    (r"pooling_kernel_size", 2),
    (r"patch_embed_hidden_size", 192),
]
# Fields that are None by default and must not be.
ABSENT = re.compile(
    r"n_(routed|shared)_experts|num_experts(_per_tok)?|n_group|topk_group|top_k_experts|head_dim|num_key_value_heads"
)
TOKEN = re.compile(r".*(token|start|end|newline|patch|bos|eos)(?<!layer_start)_(id|ids|index)")
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")

_LETTERS = [a + b for a in "ABCDEFGHIJ" for b in "ABCDEFGHIJ"]  # digits of image tokens
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}  # of half a head of 8
# What a configuration class needs beyond its fields' names, and why.
OVERRIDES: dict[str, dict[str, Any]] = {
    # read by the layers, not given by the class
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "UdopConfig": {"decoder_start_token_id": 0},
    # None by default, and no checkpoint is without
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-2, 1], [-1, 2]], "downsample_rate": "1/2", "vision_config": {"hidden_size": 64}},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 3, **{f"IMGIMG{_LETTERS[i]}Z": 10 + i for i in range(32)}}},
    "Emu3Config": {
        "vocabulary_map": {
            "<image>": 3, "<|extra_200|>": 4, **{f"<|visual token {i:06}|>": 10 + i for i in range(32)}
        }
    },
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "DiffusionGemmaTextConfig": {"moe_intermediate_size": 32},
    "Step3p7TextConfig": {"sliding_window": 8},
    "XmodConfig": {"default_language": "en_XX"},
    # one entry a layer type expected, its default sections are of a head of 128
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _MROPE}},
    "Cosmos3EdgeTextConfig": {"rope_parameters": _MROPE},
    # height, width and time, not time first
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    # its lists are of as many layers as the checkpoint's
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [2, 1]},
    # its heads fill the expanded hidden size
    "Mamba2Config": {"num_heads": 8},
    # its own tower is one of timm's
    "FastVlmConfig": {"vision_config": SiglipVisionConfig},
    # of sizes that are not fields, or that only its other towers have
    "AriaConfig": {"projector_patch_to_query_dict": {16: 8}},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [32, 32]},
    "Llama4VisionConfig": {"intermediate_size": 128},
    "Emu3VQVAEConfig": {"hidden_size": 128},
    "MllamaVisionConfig": {"intermediate_layers_indices": [1, 2], "vision_output_dim": 96},
    "Molmo2VisionConfig": {"image_size": [32, 32]},
    "MuseGlimmerConfig": {"out_hidden_size": 128},
    "MuseSparkConfig": {"out_hidden_size": 128},
    "VipLlavaConfig": {"vision_feature_layers": [-2, -1]},
    "Glm5NextTextConfig": {"index_kpool": 2},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "Dots3NoteTextConfig": {
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "head_dim": 8,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        }.items()
    },
    # drafts for another model, which has these
    "Gemma4AssistantConfig": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    # reads an encoder
    "VisionEncoderDecoderConfig": {
        "decoder_start_token_id": 0, "pad_token_id": 0, "decoder": {"add_cross_attention": True}
    },
    # the factors multiply to the sequence's length and add up to the hidden size
    "ReformerConfig": {
        "axial_pos_shape": (3, 4),
        "axial_pos_embds_dim": (8, 24),
        "num_buckets": 2,
        # it seeds dropout itself, from the clock
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    # replaces its layers in its first call otherwise, and draws random numbers for the new ones
    "BigBirdConfig": {"attention_type": "original_full"},
    # two at least share their attention
    "ZambaConfig": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


# What goes beside a model's pixels (or is them), by the name of its argument.
BESIDE: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "pixel_values": lambda pixels, text: pixels,
    "high_res_pixel_values": lambda pixels, text: pixels,
    "flattened_patches": lambda pixels, text: torch.cat([torch.ones(*pixels.shape[:-1], 2), pixels], -1),
    "image_grid_thw": lambda pixels, text: torch.tensor([[1, 4, 4]]),
    "image_merge_sizes": lambda pixels, text: torch.tensor([2]),
    "image_token_pooling": lambda pixels, text: torch.arange(16).reshape(4, 4),
    "image_grids": lambda pixels, text: torch.tensor([[2, 2, 0, 0]]),
    "target_sizes": lambda pixels, text: torch.tensor([[4, 4]]),
    "image_sizes": lambda pixels, text: torch.tensor([pixels.shape[-2:]]),
    "spatial_shapes": lambda pixels, text: torch.tensor([[4, 4]]),
    "image_position_ids": lambda pixels, text: torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
    "pixel_attention_mask": lambda pixels, text: torch.ones(pixels.shape[:2], dtype=torch.bool),
    "aspect_ratio_ids": lambda pixels, text: torch.ones(1, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda pixels, text: torch.ones(pixels.shape[:3], dtype=torch.long),
    "cross_attention_mask": lambda pixels, text: torch.ones(*text["labels"].shape, *pixels.shape[1:3]),
    "qformer_input_ids": lambda pixels, text: text["input_ids"],
    "image_embeds_position_mask": lambda pixels, text: torch.arange(text["labels"].numel())[None] < 4,
    "bbox": lambda pixels, text: torch.zeros(*text["labels"].shape, 4),
}
ALWAYS = ("pixel_values", "image_grid_thw", "image_position_ids")  # though their arguments are optional


def tiny_config(kind: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """A configuration of a class with every size small; `given` are fields of the class."""
    values = {**dict(_small(kind)), **OVERRIDES.get(kind.__name__, {}), **given}
    for name, sub in _sub_kinds(kind):
        chosen = values.get(name, {})  # fields, or another class
        values[name] = tiny_config(chosen) if isinstance(chosen, type) else tiny_config(sub, **chosen)
    if "kv_lora_rank" in values:  # latent attention has as many heads of keys and values as of queries
        values = {**values, "num_key_value_heads": values["num_attention_heads"], "head_dim": values["qk_rope_head_dim"]}
    config = kind(**values)
    if "rope_parameters" not in values:
        _split_rotation(config, **values)
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
        elif _is_size(value):
            yield name, next(tokens) if TOKEN.fullmatch(name) else size_of(name, value)
        elif isinstance(value, (tuple, list)) and value and all(map(_is_size, value)):
            yield name, type(value)(size_of(name, v) for v in value)
        elif value is None and TOKEN.fullmatch(name):
            yield name, next(tokens)
        elif value is None and ABSENT.fullmatch(name):
            yield name, size_of(name, 32)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def size_of(name: str, value: int) -> int:
    """What an integer field of this name and default becomes."""
    return min(value, next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), 32))


def _sub_kinds(kind: type[PreTrainedConfig]) -> Iterator[tuple[str, type[PreTrainedConfig]]]:
    for name, spec in (getattr(kind, "sub_configs_defaults", None) or kind.sub_configs).items():
        sub = getattr(spec, "config_class", spec)
        if name == "vision_config" or not getattr(spec, "optional", False):
            yield name, sub if issubclass(sub, PreTrainedConfig) else CONFIG_MAPPING[spec.model_type]


def build(mapping: str, model_type: str) -> nn.Module:
    """A tiny random model of a type, in training mode, with no parameter left at zero or one by its initialization."""
    config: Any = tiny_config(CONFIG_MAPPING[model_type])
    config._experts_implementation = "eager"  # the fast ones have no float64
    cls = MAPPINGS[mapping][0]._model_mapping[type(config)]
    cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    parts = [part for part in vars(config).values() if type(part) is cls.config_class]  # the text model of a whole
    torch.manual_seed(0)
    model = cls(parts[0] if parts else config).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def text_inputs(rows: int = 2, length: int = 12) -> dict[str, Any]:
    """Token ids [B, T] that are no special tokens, and labels with ignored positions at both ends."""
    torch.manual_seed(1)
    ids = torch.randint(V // 2, V, (rows, length))
    labels = ids.clone()
    labels[0, :4], labels[-1, -3:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def image_inputs(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What an image-text model may take, best first; each is tried until one is accepted."""
    text = text_inputs(rows=1)
    asked = inspect.signature(model.forward).parameters
    for pixels in _pixels(model.config):
        with contextlib.suppress(Exception):  # it wants its images another way
            yield "with an image", _interleaved(model, text, pixels)
        if _reader(model) is None:
            images = {name: make(pixels, text) for name, make in BESIDE.items() if name in asked}
            if images:
                given = {name: x for name, x in text.items() if name in ("labels", *asked)}
                yield "with an image", {**given, **images}
    yield "text alone", {**text, **_types(model, text["input_ids"] < 0)}


def _reader(model: Any) -> Any:
    """The method that makes a model's image tokens, or None."""
    parts = [(part, f"get_{kind}_features") for part in (model.base_model, model) for kind in ("image", "video")]
    return next((getattr(part, name) for part, name in parts if hasattr(part, name)), None)


def _interleaved(model: Any, text: dict[str, Any], pixels: Tensor) -> dict[str, Any]:
    """Text after as many image tokens as the model makes of these pixels."""
    get, config = _reader(model), model.config
    wanted = inspect.signature(get).parameters
    images = {
        name: make(pixels, text)
        for name, make in BESIDE.items()
        if name in wanted and (wanted[name].default is inspect.Parameter.empty or name in ALWAYS)
    }
    features = get(**images)
    parts = (getattr(features, name, None) for name in ("pooler_output", "last_hidden_state"))
    features = next((part for part in parts if part is not None), features)
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")
    tokens = (getattr(config, name, None) for name in names)
    token = next(token for token in tokens if token is not None)
    added = torch.full((1, features.numel() // features.shape[-1]), token)
    ids = torch.cat([added, text["input_ids"]], 1)
    labels = torch.cat([torch.full_like(added, -100), text["labels"]], 1)
    return {"input_ids": ids, "labels": labels, **images, **_types(model, ids == token)}


def _types(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Which tokens stand for an image, if the model wants to be told."""
    asked = inspect.signature(model.forward).parameters
    return {name: images.int() for name in ("mm_token_type_ids", "token_type_ids") if name in asked}


def _pixels(config: Any) -> Iterator[Tensor]:
    """A random image in every form there is: flattened patches, patches, a square, one of several squares, tiles."""
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)

    def first(*names: str, default: int) -> int:
        found = next((x for x in (getattr(vision, name, None) for name in names) if x), default)
        return found[0] if isinstance(found, (tuple, list)) else found

    channels = first("in_channels", "num_channels", default=3)
    side, patch = first("image_size", default=32), first("model_patch_size", "patch_size", default=8)
    frames = first("temporal_patch_size", "patch_temporal", default=1)
    yield torch.randn(16, channels * frames * patch**2)
    yield torch.randn(16, channels, patch, patch)
    yield torch.randn(1, channels, side, side)
    yield torch.randn(1, 1, channels, side, side)
    yield torch.randn(1, 2, channels, side, side)
    yield torch.randn(1, 16, channels * patch**2)
    yield torch.randn(1, 1, first("max_num_tiles", default=1), channels, side, side)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One call's loss and every parameter's gradient; `own`: whether the model computed the loss itself."""

    loss: Tensor
    gradients: dict[str, Tensor]
    own: bool


def _outside(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[:2] != labels.shape:  # diffusion models score a canvas of their own
        labels = torch.arange(logits.shape[:2].numel()).reshape(logits.shape[:2]) % V
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def run(model: nn.Module, inputs: dict[str, Any]) -> Answer:
    """One call, with the same random numbers as in any other."""
    set_seed(2)
    out = model(**inputs)
    own = out.get("loss") is not None
    loss = out.loss if own else _outside(out.logits, inputs["labels"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # sinusoidal positions do not
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return Answer(loss.detach(), gradients, own)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a class fared: streamed, materialized, refused or not built; a difference from stock is an AssertionError."""

    model_type: str
    cls: str
    status: str
    note: str = ""


def judge(mapping: str, model_type: str) -> Verdict:
    """Build a class, run it stock and patched on the same inputs, and compare loss and every parameter's gradient."""
    names = MAPPINGS[mapping][1][model_type]
    cls = names if isinstance(names, str) else names[0]
    try:
        model = build(mapping, model_type)
    except Exception as error:  # whatever transformers raises is the reason
        return Verdict(model_type, cls, "not built", f"{type(error).__name__}: {_one_line(error)}")
    cls = type(model).__name__
    try:
        unpatch(patch(model))
    except ValueError as refusal:
        return Verdict(model_type, cls, "refused", _one_line(refusal))
    try:
        note, inputs, stock = _stock(model, _candidates(mapping, model))
    except Exception as error:
        return Verdict(model_type, cls, "not run", f"{type(error).__name__}: {_one_line(error)}")
    patch(model, always=not stock.own)
    ours = run(model, inputs)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=2e-6, atol=0)  # float32 in most: logits are cast to it
    assert_same_gradients(ours.gradients, stock.gradients, rtol=1e-5)
    seam = seam_of(model)
    assert seam.streamed + seam.materialized > 0, "the head was never asked"
    if not stock.own:
        note = ", ".join(filter(None, [note, "computes no loss: always=True, and the loss outside"]))
    return Verdict(model_type, cls, "materialized" if seam.materialized else "streamed", note)


def _candidates(mapping: str, model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    if mapping == "causal LM":
        yield "", text_inputs()
    yield from image_inputs(model)


def _stock(model: nn.Module, candidates: Iterable[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any], Answer]:
    """The first inputs the unpatched model takes, what they are, and its answer. Raises: the last one's error.

    The model is left in float64, where differences are no rounding, or else in float32 (some cast to it on their way).
    """
    error = None
    for note, inputs in candidates:
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
            try:
                answer = run(model, cast)
                assert answer.loss.isfinite(), "the loss is not finite"
                return note, cast, answer
            except Exception as refused:  # it wants something else
                error = refused
    assert error is not None
    raise error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/")


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """All verdicts as Markdown, counts first."""
    lines = [
        "# Every causal LM and image-text model of transformers, patched",
        "",
        "Each class is built tiny and random (scale, softcap, auxiliary losses and head bias set wherever its"
        " configuration has them) and run stock and patched on the same inputs: loss and every parameter's gradient"
        " agree, or `tests/test_zoo.py` fails. *streamed*: no logits were made; *materialized*: they were, once.",
        "",
        f"transformers {transformers.__version__}; made by `python tests/zoo.py`.",
    ]
    for mapping, rows in verdicts.items():
        counts = Counter(row.status for row in rows)
        summary = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        lines += ["", f"## {mapping.capitalize()}: {len(rows)} model types", "", f"{summary}.", ""]
        lines += ["| model type | class | status | note |", "|---|---|---|---|"]
        lines += [f"| {row.model_type} | {row.cls} | {row.status} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"


def committed() -> dict[tuple[str, str], str] | None:
    """The table's statuses by mapping and model type; None if it was made with another transformers."""
    text = TABLE.read_text()
    if f"transformers {transformers.__version__};" not in text:
        return None
    found, mapping = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            mapping = next(name for name in MAPPINGS if line[3:].startswith(name.capitalize()))
        elif line.startswith("| ") and not line.startswith("| model type"):
            model_type, _, status, _ = (cell.strip() for cell in line.strip("|").split("|"))
            found[mapping, model_type] = status
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the models' own
    transformers.logging.set_verbosity_error()
    TABLE.write_text(
        table({mapping: [judge(mapping, name) for name in names] for mapping, (_, names) in MAPPINGS.items()})
    )
