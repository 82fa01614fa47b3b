"""Every causal LM and image-text model of the installed transformers, tiny and random, stock against patched.

No class is listed: transformers' own mappings name them, and `tiny_configs` makes a small configuration of any.
`cd tests && python -m support.zoo` writes the table of all verdicts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, set_seed
from transformers.models.auto import modeling_auto

from hf_xent.patching import patch, patch_state, unpatch
from support.models import V, assert_same_gradients
from support.tiny_configs import tiny_config

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "models.md"
MAPPINGS: dict[str, tuple[Any, Any]] = {
    "Causal LM": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "Image-text": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
CASES = [(mapping, model_type) for mapping, (_, names) in MAPPINGS.items() for model_type in names]
STATUSES = ("streamed", "materialized", "refused", "not run", "not built")
LACKS_PACKAGE = "ImportError"  # in the note of a class that needs a package a machine lacks


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


def text_inputs(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Token ids [B, T] that are no special tokens, and labels with ignored positions at both ends."""
    torch.manual_seed(1)
    ids = torch.randint(V // 2, V, (rows, length))
    labels = ids.clone()
    labels[0, :4], labels[-1, -3:] = -100, -100
    return {"input_ids": ids, "labels": labels}


# An image's pixels and what goes beside them, by the name of the model's argument, of pixels and text_inputs.
PICTURED: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "pixel_values": lambda pixels, text: pixels,
    "high_res_pixel_values": lambda pixels, text: pixels,
    "flattened_patches": lambda pixels, text: torch.cat([torch.ones(*pixels.shape[:-1], 2), pixels], -1),
    "image_grid_thw": lambda pixels, text: torch.tensor([[1, 4, 4]]),
    "image_position_ids": lambda pixels, text: torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
    "image_merge_sizes": lambda pixels, text: torch.tensor([2]),
    "image_sizes": lambda pixels, text: torch.tensor([pixels.shape[-2:]]),
    "image_token_pooling": lambda pixels, text: torch.arange(16).reshape(4, 4),
    "image_grids": lambda pixels, text: torch.tensor([[2, 2, 0, 0]]),
    "image_embeds_position_mask": lambda pixels, text: torch.arange(text["labels"].numel())[None] < 4,
    "target_sizes": lambda pixels, text: torch.tensor([[4, 4]]),
    "spatial_shapes": lambda pixels, text: torch.tensor([[4, 4]]),
    "pixel_attention_mask": lambda pixels, text: torch.ones(pixels.shape[:2], dtype=torch.bool),
    "aspect_ratio_ids": lambda pixels, text: torch.ones(1, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda pixels, text: torch.ones(pixels.shape[:3], dtype=torch.long),
    "cross_attention_mask": lambda pixels, text: torch.ones(*text["labels"].shape, *pixels.shape[1:3]),
    "qformer_input_ids": lambda pixels, text: text["input_ids"],
    "bbox": lambda pixels, text: torch.zeros(*text["labels"].shape, 4),
}
_NEEDED = ("pixel_values", "image_grid_thw", "image_position_ids")  # though their arguments are optional
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")


def inputs_of(mapping: str, model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What a model may take, best first, each with a note; they are tried until one is accepted."""
    if mapping == "Causal LM":
        yield "", text_inputs()
    text = text_inputs(rows=1)
    asked = inspect.signature(model.forward).parameters
    for pixels in _pixels(model.config):
        with contextlib.suppress(Exception):  # it wants its images another way
            yield "with an image", _after_image_tokens(model, text, pixels)
        pictured = {name: make(pixels, text) for name, make in PICTURED.items() if name in asked}
        if pictured and _reader(model) is None:  # it makes no tokens of images
            yield "with an image", {**{name: x for name, x in text.items() if name in asked}, **pictured}
    yield "text alone", {**text, **_types(model, text["input_ids"] < 0)}


def _pixels(config: Any) -> Iterator[Tensor]:
    """A random image in every form there is: flattened patches, patches, squares, patches of a batch, tiles."""
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)

    def first(*names: str, default: int) -> int:
        found = next((x for x in (getattr(vision, name, None) for name in names) if x), default)
        return found[0] if isinstance(found, (tuple, list)) else found

    channels, side = first("in_channels", "num_channels", default=3), first("image_size", default=32)
    patch = first("model_patch_size", "patch_size", default=8)
    frames = first("temporal_patch_size", "patch_temporal", default=1)
    yield torch.randn(16, channels * frames * patch**2)
    yield torch.randn(16, channels, patch, patch)
    yield torch.randn(1, channels, side, side)
    yield torch.randn(1, 1, channels, side, side)
    yield torch.randn(1, 2, channels, side, side)
    yield torch.randn(1, 16, channels * patch**2)
    yield torch.randn(1, 1, first("max_num_tiles", default=1), channels, side, side)


def _reader(model: Any) -> Any:
    """The method that makes a model's image tokens, or None."""
    parts = [(part, f"get_{kind}_features") for part in (model.base_model, model) for kind in ("image", "video")]
    return next((getattr(part, name) for part, name in parts if hasattr(part, name)), None)


def _after_image_tokens(model: Any, text: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Text after as many image tokens as the model makes of these pixels. Raises: whatever it raises at them."""
    read = _reader(model)
    wanted = inspect.signature(read).parameters
    pictured = {
        name: make(pixels, text)
        for name, make in PICTURED.items()
        if name in wanted and (name in _NEEDED or wanted[name].default is inspect.Parameter.empty)
    }
    answer = read(**pictured)
    parts = (getattr(answer, name, None) for name in ("pooler_output", "last_hidden_state"))
    features = next((part for part in parts if part is not None), answer)
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    found = (getattr(model.config, name, None) for name in _IMAGE_TOKENS)
    token = next(token for token in found if token is not None)
    added = torch.full((1, features.numel() // features.shape[-1]), token)
    ids = torch.cat([added, text["input_ids"]], 1)
    labels = torch.cat([torch.full_like(added, -100), text["labels"]], 1)
    return {"input_ids": ids, "labels": labels, **pictured, **_types(model, ids == token)}


def _types(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Which tokens stand for an image, if the model wants to be told."""
    asked = inspect.signature(model.forward).parameters
    return {name: images.int() for name in ("mm_token_type_ids", "token_type_ids") if name in asked}


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


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Answer:
    """One call, with the same random numbers as in any other."""
    set_seed(2)
    out = model(**inputs)
    own = out.get("loss") is not None
    loss = out.loss if own else _outside(out.logits, inputs["labels"])
    assert loss.isfinite(), f"the loss is {loss}"
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # sinusoidal positions do not
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return Answer(loss.detach(), gradients, own)


def run_stock(
    model: nn.Module, candidates: Iterable[tuple[str, dict[str, Tensor]]]
) -> tuple[str, dict[str, Tensor], Answer]:
    """The first inputs the unpatched model takes: what they are, they, and its answer. Raises: the last one's error.

    The model is left in float64, where differences are no rounding, or else in float32: some cast to it on their way.
    """
    error = None
    for note, inputs in candidates:
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
            try:
                return note, cast, run(model, cast)
            except Exception as refused:  # it wants something else
                error = refused
    assert error is not None
    raise error


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a class fared, one of STATUSES; a difference from stock is none, but an AssertionError."""

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
        note, inputs, stock = run_stock(model, inputs_of(mapping, model))
    except Exception as error:
        return Verdict(model_type, cls, "not run", f"{type(error).__name__}: {_one_line(error)}")
    patch(model, always=not stock.own)
    ours = run(model, inputs)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=2e-6, atol=0)  # most cast their logits to float32
    assert_same_gradients(ours.gradients, stock.gradients, rtol=1e-5)
    state = patch_state(model)
    assert state.streamed + state.materialized > 0, "the head was never asked"
    if not stock.own:
        note = ", ".join(filter(None, [note, "computes no loss: always=True, and the loss outside"]))
    return Verdict(model_type, cls, "materialized" if state.materialized else "streamed", note)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/")


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """All verdicts as Markdown, counts first."""
    lines = [
        "# Every causal LM and image-text model of transformers, patched",
        "",
        "Each class is built tiny and random (scale, softcap, auxiliary losses and head bias set wherever its"
        " configuration has them) and run stock and patched on the same inputs, in training mode and float64: loss and"
        " every parameter's gradient agree, or `tests/test_zoo.py` fails. *streamed*: no logits were made;"
        " *materialized*: they were, once; *refused*: `patch` raised that error.",
        "",
        f"transformers {transformers.__version__}; made by `cd tests && python -m support.zoo`.",
        "",
        "| mapping | model types | " + " | ".join(STATUSES) + " |",
        "|---" * (2 + len(STATUSES)) + "|",
    ]
    for mapping, rows in verdicts.items():
        counts = Counter(row.status for row in rows)
        lines.append(f"| {mapping} | {len(rows)} | " + " | ".join(str(counts[status]) for status in STATUSES) + " |")
    for mapping, rows in verdicts.items():
        lines += ["", f"## {mapping}", "", "| model type | class | status | note |", "|---|---|---|---|"]
        lines += [f"| {row.model_type} | {row.cls} | {row.status} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"


def committed() -> dict[tuple[str, str], Verdict] | None:
    """The table's verdicts by mapping and model type; None if it was made with another transformers."""
    text = TABLE.read_text()
    if f"transformers {transformers.__version__};" not in text:
        return None
    found = {}
    for mapping in MAPPINGS:
        _, _, section = text.partition(f"## {mapping}\n")
        for line in section.partition("\n## ")[0].splitlines()[3:]:
            row = Verdict(*(cell.strip() for cell in line.strip("|").split("|")))
            found[mapping, row.model_type] = row
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the models' own
    transformers.logging.set_verbosity_error()
    TABLE.write_text(
        table({mapping: [judge(mapping, name) for name in names] for mapping, (_, names) in MAPPINGS.items()})
    )
