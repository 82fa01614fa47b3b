"""Every class of transformers' language-modeling mappings, tiny and random, stock against patched.

No class is listed: transformers' own mappings name them, `tiny_configs` makes a small configuration of any, and
`zoo_inputs` what it reads. `cd tests && python -m support.zoo` writes the table of all verdicts.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, set_seed
from transformers.models.auto import modeling_auto

from hf_xent.lazy import PatchState
from hf_xent.losses import Focal
from hf_xent.patching import patch, patch_state, unpatch
from hf_xent.patching.float64 import in_float64
from hf_xent.patching.heads import layers_of
from support.models import V, assert_same_gradients
from support.tiny_configs import tiny_config
from support.zoo_inputs import inputs_of

TABLE = Path(__file__).parents[2] / "docs" / "results" / "models.md"
_AUTO = {
    "Causal LM": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "Image-text": ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT"),
    "Seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "Masked LM": ("AutoModelForMaskedLM", "MASKED_LM"),
    "Speech-seq2seq": ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
    "Text-to-waveform": ("AutoModelForTextToWaveform", "TEXT_TO_WAVEFORM"),
}
MAPPINGS: dict[str, tuple[Any, Any]] = {
    mapping: (getattr(transformers, auto), getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
    for mapping, (auto, task) in _AUTO.items()
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
    if mapping == "Masked LM":  # its layers look both ways
        config.is_decoder = False
    torch.manual_seed(0)
    model = cls(parts[0] if parts else config).train()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.Parameter) or name.endswith("logits_bias"):  # BART's bias of the logits is a buffer
            nn.init.normal_(tensor, std=0.2)
    return model


@dataclasses.dataclass(frozen=True)
class Answer:
    """One call's loss and every parameter's gradient; `own`: whether the model computed the loss itself."""

    loss: Tensor
    gradients: dict[str, Tensor]
    own: bool


def _outside(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None or logits.shape[:2] != labels.shape:  # diffusion models score a canvas of their own
        labels = torch.arange(logits.shape[:2].numel()).reshape(logits.shape[:2]) % V
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def run(model: nn.Module, inputs: dict[str, Tensor], exactly: AbstractContextManager[None] | None = None) -> Answer:
    """One call, with the same random numbers as in any other; `exactly`: the context of its forward pass."""
    set_seed(2)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # sinusoidal positions do not
    with exactly or nullcontext():
        out = model(**inputs)
    own = out.get("loss") is not None
    loss = out.loss if own else _outside(out.logits, inputs.get("labels"))
    assert loss.isfinite(), f"the loss is {loss}"
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
    head = layers_of(model)[0]
    for note, inputs in candidates:
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
            try:
                return note, cast, run(model, cast, in_float64(head))  # most cast their logits to float32
            except Exception as refused:  # it wants something else
                error = refused
    assert error is not None
    raise error


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a class fared, one of STATUSES; a difference from stock is none, but an AssertionError.

    `losses`: whether it takes other losses, which is tried with one that equals cross-entropy.
    """

    model_type: str
    cls: str
    status: str
    losses: str = ""
    note: str = ""


def judge(mapping: str, model_type: str) -> Verdict:
    """Build a class, run it stock and patched on the same inputs, and compare loss and every parameter's gradient."""
    names = MAPPINGS[mapping][1][model_type]
    cls = names if isinstance(names, str) else names[0]
    try:
        model = build(mapping, model_type)
    except Exception as error:  # whatever transformers raises is the reason
        return Verdict(model_type, cls, "not built", note=f"{type(error).__name__}: {_one_line(error)}")
    cls = type(model).__name__
    try:
        unpatch(patch(model))
    except ValueError as refusal:
        return Verdict(model_type, cls, "refused", note=_one_line(refusal))
    try:
        note, inputs, stock = run_stock(model, inputs_of(mapping, model))
    except Exception as error:
        return Verdict(model_type, cls, "not run", note=f"{type(error).__name__}: {_one_line(error)}")
    state = _compare(patch(model, always=not stock.own), inputs, stock)
    if not stock.own:
        note = ", ".join(filter(None, [note, "computes no loss: always=True, and the loss outside"]))
    if not state.streamed:
        note = ", ".join(filter(None, [note, state.why_dense]))
    status = "materialized" if state.materialized or not state.streamed else "streamed"
    return Verdict(model_type, cls, status, _other_losses(model, inputs, stock) if stock.own else "outside", note)


def _compare(model: nn.Module, inputs: dict[str, Tensor], stock: Answer) -> PatchState:
    """Run a patched model, and compare loss and every gradient with stock's; the state of its patch."""
    ours = run(model, inputs)
    torch.testing.assert_close(ours.loss.double(), stock.loss.double(), rtol=2e-6, atol=0)  # many return it in float32
    assert_same_gradients(ours.gradients, stock.gradients, rtol=1e-5)
    state = patch_state(model)
    assert state.streamed + state.materialized + state.bypassed > 0, "the head was never asked"
    return state


def _other_losses(model: nn.Module, inputs: dict[str, Tensor], stock: Answer) -> str:
    """Whether another loss takes the place of cross-entropy: 'yes', or the error that says that it does not."""
    try:
        state = _compare(patch(model, loss=Focal(gamma=0.0)), inputs, stock)
    except RuntimeError as refusal:
        return _one_line(refusal)
    assert state.streamed, "the other loss had no effect, and nothing said so"
    return "yes"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].replace("|", "/")


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """All verdicts as Markdown, counts first."""
    lines = [
        "# Every language model of transformers, patched",
        "",
        "`hf_xent.patch(model)` changes how a model computes its loss, not what comes out. This page lists the classes"
        " for which that is tested: look up `model.config.model_type` in the mapping of the `Auto` class that loads"
        " it.",
        "",
        "Each class is built tiny and random (scale, softcap, auxiliary losses and head bias set wherever its"
        " configuration has them) and run stock and patched on the same inputs, in training mode and float64: loss"
        " and every parameter's gradient agree, or `tests/test_zoo.py` fails.",
        "",
        "- *streamed*: the same loss, and no logits were made. *materialized*: the same loss, but the logits were"
        " made, so that nothing is saved. *refused*: `patch` raised the error in the note, and the model is as it"
        " was.",
        "- *not run*: the stock model does not run by itself on these inputs. *not built*: it needs a package that"
        " was not installed. Nothing is known about either. Notes are cut after 200 characters.",
        "- *other losses*: whether `patch(model, loss=...)` puts one in the place of the model's cross-entropy,"
        " tried with a focal loss that equals it (gamma = 0); *outside*: the model computes no loss.",
        "",
        "Several codebooks: the head of CSM's first one streams, and takes other losses; a depth decoder (CSM, Moshi)"
        " has a weight for each position, and keeps its logits of about a thousand columns. MusicGen and Bark have"
        " several heads, Dia and Higgs Audio share one among their codebooks, and are refused. Several tokens at a"
        " time: transformers trains ProphetNet's streams of predictions, which are one head's rows and stream; its"
        " other layers for multi-token prediction draft in `generate` and have no loss.",
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
        lines += [
            "",
            f"## {mapping}",
            "",
            "| model type | class | status | other losses | note |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(dataclasses.astuple(row))} |" for row in rows]
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
    verdicts = {mapping: [judge(mapping, name) for name in names] for mapping, (_, names) in MAPPINGS.items()}
    TABLE.write_text(table(verdicts))
