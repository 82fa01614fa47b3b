"""Translation learned from noisy targets: cross-entropy against EISL, after the same steps of cross-entropy.

    pip install sacrebleu
    python examples/noisy_translation.py FOLDER [--language fr] [--noises 0.5,0] [--seeds 3] [--output out/noisy]

FOLDER has .mo files (mo_pairs.py): short messages of programs. In training and validation a share of the words of every
translation is noisy ('shuffle': they trade places); test translations are clean. All arms of a seed share the first
steps, of cross-entropy, and differ in the last third: EISL with n = 1, 2, alone, with cross-entropy, and with the
model's own inputs; controls are losses that are robust to noise, GCE (comp_sum of tau 1.7) and label smoothing, and
cross-entropy with own inputs. The learning rate is cross-entropy's best on noisy validation pairs. Controls without a
model: the source itself, and the translation of the nearest source (character n-grams).
Decided before: EISL helps if the 95 % interval of its BLEU minus that of cross-entropy is above 0 at 50 % noise; the
effect should grow with noise, and be absent at 0. Three arms are of EISL: the best of them is not a test of its own.
"""

from pathlib import Path
from typing import Any

import mo_pairs
import typer
from noisy_models import ARMS, CE, new, rows, train, translated, worse
from sacrebleu import corpus_bleu, corpus_chrf
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_xent.data import subwords
from hf_xent.data.target_noise import TargetNoise
from hf_xent.experiments.study import Study

COPY, NEAREST, METRICS = "the source", "translation of the nearest source", ("BLEU", "chrF")
RATES, WARM, VOCABULARY, HELD = (2e-3, 4e-3), 2 / 3, 3000, 400


def nearest(pairs: mo_pairs.Pairs, sources: list[str]) -> list[str]:
    """The translations of the sources whose character n-grams are most alike."""
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4)).fit(pairs)
    known, targets = vectors.transform(pairs), [*pairs.values()]
    return [targets[i] for i in (vectors.transform(sources) @ known.T).toarray().argmax(1)]


def main(
    folder: Path, language: str = "fr", noises: str = "0.5,0", kind: str = "shuffle", steps: int = 450,
    seeds: int = 3, output: Path = Path("out/noisy_translation"),
) -> dict[float, Any]:  # fmt: skip
    """All noises, arms and seeds; returns the results by noise."""
    parts, found = mo_pairs.split(mo_pairs.read(folder, language), HELD), {}
    texts = [f" {text}" for pair in parts.train.items() for text in pair]
    tokenizer = subwords.train(texts, VOCABULARY, "bpe", ("</s>", "<pad>"))
    options = {"max_steps": steps, "ce_steps": round(WARM * steps)}
    for share in map(float, noises.split(",")):
        settings = {"language": language, "pairs": len(parts.train), "noise": f"{kind} {share}", "steps": steps}
        study = Study(f"{kind} {share}", METRICS, CE, output / f"{kind}-{share}", seeds, settings)

        def trained(arm: str, seed: int, rate: float, share: float = share, study: Study = study) -> Any:
            noisy = rows(tokenizer, worse(parts.train, TargetNoise(kind, share, seed)))
            runs = study.output / f"{rate}-{seed}"
            return train(arm, new(len(tokenizer), seed), noisy, runs, learning_rate=rate, seed=seed, **options)

        held = rows(tokenizer, worse(parts.validation, TargetNoise(kind, share, seeds)))

        def validated(rate: float, held: list[Any] = held, trained: Any = trained) -> float:
            return trained(CE, 0, rate).evaluate(held)["eval_loss"]

        rate = study.tuned(CE, RATES, validated, higher=False)
        for arm, seed in study.runs([*ARMS, COPY, NEAREST]):
            if arm in ARMS:
                texts = translated(trained(arm, seed, rate).model, tokenizer, [*parts.test])
            else:
                known = worse(parts.train, TargetNoise(kind, share, seed))
                texts = [*parts.test] if arm == COPY else nearest(known, [*parts.test])
            expected = [[*parts.test.values()]]
            study.record(arm, seed, BLEU=corpus_bleu(texts, expected).score, chrF=corpus_chrf(texts, expected).score)
        found[share] = study.report(f"Made by `examples/noisy_translation.py` of hf_xent; learning rate {rate:g}.")
    return found


if __name__ == "__main__":
    typer.run(main)
