"""A Space that scores texts: was a model trained on them, or did one write them? `hf_xent.detection.TextScorer`."""

import os
from functools import lru_cache

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported

import gradio as gr
import pandas as pd

from hf_xent import detection
from hf_xent.models import loading

MOST_TEXTS, MOST_TOKENS = 32, 256
MODELS = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M", "EleutherAI/pythia-160m")
SCORES = ("loss", "zlib", "lowercase", "min_k", "min_k_pp", "fast_detect")
"""Those that need one model and no corpus."""
WARNING = """**What these numbers cannot tell.** A score of one text is no evidence: it says how predictable the text is
for this model, which depends on topic, style, language and length more than on membership or on its author. Compare the
scores of many texts of the same kind, some of which are known, and look at the rate of false alarms: `hf-xent detect`
does that with labels, beside a *blind* baseline that never saw the model. If the baseline separates the classes, too,
no score is evidence of membership. Do not decide about a person by such a score.
"""
INTRODUCTION = """# Was it trained on? Was it generated?

Scores of texts under a language model: each is computed from one forward pass. Paste texts, with an empty line between
two of them.
"""


def texts_of(pasted: str) -> list[str]:
    """The texts between empty lines. Raises: ValueError for none, or for too many."""
    parts = "\n".join(line.rstrip() for line in pasted.splitlines()).split("\n\n")
    texts = [part.strip() for part in parts if part.strip()]
    if not 0 < len(texts) <= MOST_TEXTS:
        raise ValueError(f"there are {len(texts)} texts: paste 1 to {MOST_TEXTS}, with an empty line between two")
    return texts


@lru_cache(maxsize=1)
def loaded(model: str):
    """A model and its tokenizer; the last one stays in memory. Raises: ValueError if there is none."""
    return loading.load(model)


def scores(pasted: str, names: list[str], model: str) -> pd.DataFrame:
    """The scores of texts.

    Args:
        pasted: Texts, with an empty line between two.
        names: Names in `hf_xent.detection.SCORES`.
        model: A packaged model's name, or a Hub id.

    Returns:
        A row for each text, with its beginning and a column for each score, whose title has its direction.

    Raises:
        ValueError: There are no texts, no names, or no such model.
    """
    texts = texts_of(pasted)
    if not names:
        raise ValueError("no score is chosen: choose at least one")
    scorer = detection.TextScorer(*loaded(model.strip()), tuple(names), max_tokens=MOST_TOKENS, progress=False)
    rows = {"text": [text if len(text) <= 60 else f"{text[:57]}..." for text in texts]}
    for name, values in scorer(texts).items():
        rows[f"{name} ({direction(name)})"] = [float(f"{value:.4g}") for value in values]
    return pd.DataFrame(rows)


def direction(name: str) -> str:
    """Which values of a score speak for a member of the training set, or for a generated text."""
    return "higher: yes" if detection.get(name).higher_is == "positive" else "lower: yes"


def answer(pasted, names, model):
    """What the button shows; an error is shown as one line."""
    try:
        return scores(pasted, names, model), WARNING
    except (ValueError, ImportError, OSError) as error:
        raise gr.Error(str(error)) from error


def interface() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Scores of texts", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        pasted = gr.Textbox(lines=8, label=f"Texts: at most {MOST_TEXTS}, of each the first {MOST_TOKENS} tokens count")
        with gr.Row():
            names = gr.CheckboxGroup(SCORES, value=["loss", "min_k_pp", "fast_detect"], label="Scores")
            model = gr.Dropdown(
                MODELS,
                value=MODELS[0],
                label="Model",
                info="or any other causal LM on the Hub",
                allow_custom_value=True,
            )
        button = gr.Button("Score", variant="primary")
        table = gr.Dataframe(label="Scores; 'yes' is: trained on, or generated", interactive=False, wrap=True)
        warning = gr.Markdown(WARNING)
        button.click(answer, [pasted, names, model], [table, warning], api_name="scores")
    return page


if __name__ == "__main__":
    interface().launch()
