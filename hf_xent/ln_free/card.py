"""Checkpoints of models without norms: weights, tokenizer, and a card with the code that loads them *without norms*.

removable   only hf_xent.ln_free.load: a stock class would load the weights too, but normalize again
eps trick   any stock class
true        trust_remote_code=True: the class comes with the weights, and without it transformers refuses, since it
            does not know the model's type
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import hub
from ..hub import Usage
from .forms import form_of
from .removal import sites
from .report import Report
from .verification import verify
from .wrapping import usage

STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PLACE"{trust})
tokenizer = AutoTokenizer.from_pretrained("PLACE"{trust})"""
FORMS = {
    "removable": "The weights are those of training; each norm is a fixed affine map, which `hf_xent` applies.",
    "eps trick": """\
The norms are still called, but the eps in the configuration is so large that the variance has no effect: they compute
an affine map. Their weights are as large as its root: load it in bfloat16 or float32, float16 may overflow.""",
    "true": """\
There is no norm in it. Scale and centering were folded into the layers that read them, the head included, which is
therefore not tied to the embeddings. The class comes with the weights: it needs torch and transformers, not hf_xent.
Without `trust_remote_code=True` transformers refuses to load it, instead of adding untrained norms.""",
}
"""Form -> its description in the card."""


def save(model: Any, tokenizer: Any, folder: str | Path, report: Report | None = None) -> Path:
    """Saves a causal LM without norms, in any form, with a card whose code loads it without norms.

    Base model, license, language and data are taken from the card of the model's source. `hf-xent publish FOLDER
    --repo-id ...` uploads the folder.

    Args:
        model: A causal LM in which nothing normalizes: removable with all norms removed, eps trick, or true.
        tokenizer: Its tokenizer; may be None.
        folder: The folder to write; it is made if it does not exist.
        report: Analyses for the card, with their plots.

    Returns:
        The folder.

    Raises:
        ValueError: The model still normalizes.
    """
    from huggingface_hub import ModelCardData

    folder, form = Path(folder), form_of(model)
    verification = verify(model)
    if not verification.ln_free:
        left = [site.name for site in sites(model) if not site.removed] if form == "removable" else []
        reason = f"{len(left)} norms are left in it, {left[0]} first" if left else f"its form is {form}"
        raise ValueError(f"model is a {type(model).__name__} that normalizes ({reason}): remove its norms first")
    origin, use = hub.origin(model.config._name_or_path), _usage(model, form, tokenizer)
    head = ModelCardData(
        license=origin["license"] or "unknown",
        language=origin["language"],
        library_name=use.library,
        pipeline_tag=use.task,
        base_model=origin["base_model"],
        datasets=origin["datasets"],
        tags=["hf_xent", "ln-free"],
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if report is not None:
        report.save(folder)
    text = hub.render(
        "ln_free",
        head,
        name=folder.resolve().name,
        kind=type(model).__name__,
        base=origin["base_model"] if isinstance(origin["base_model"], str) else None,
        use=use.section(),
        form=FORMS[form],
        verification=verification,
        report=report.markdown() if report is not None else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def _usage(model: Any, form: str, tokenizer: Any) -> Usage:
    if form == "removable":
        return usage(model)
    code = STOCK.format(trust=", trust_remote_code=True" if form == "true" else "")
    if tokenizer is None:
        code = code.rpartition("\n")[0].replace(", AutoTokenizer", "")
    return Usage(code, task="text-generation")
