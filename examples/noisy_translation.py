"""Translation learned from noisy targets: cross-entropy against EISL, after the same steps of cross-entropy.

    pip install sacrebleu
    python examples/noisy_translation.py FOLDER [--noises shuffle:0.5,shuffle:0] [--parallel] [--seeds 3] [--output out]

FOLDER has .mo files (mo_pairs.py): short messages of programs. In training and validation a share of the words of every
translation is noisy ('shuffle': they trade places); test translations are clean. All arms of a seed share the first
steps, of cross-entropy, and differ in the last third: EISL with n = 1, 2, alone, with cross-entropy, and with the
model's own inputs; controls are GCE (comp_sum of tau 1.7) and label smoothing, which are robust to noise, and
cross-entropy with own inputs. The learning rate is cross-entropy's best on noisy validation pairs. Controls without a
model: the source, and the translation of the nearest source. `--parallel`: all tokens at once (parallel_models.py).
Decided before: EISL helps if the 95 % interval of its BLEU minus that of cross-entropy is above 0 at 50 % noise; the
effect should grow with noise, and be absent at 0. Three arms are of EISL: the best of them is not a test of its own.
"""

from pathlib import Path
from typing import Any

import mo_pairs
import noisy_models
import parallel_models
import typer
from noisy_models import CE, worse
from sacrebleu import corpus_bleu, corpus_chrf
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_xent.data import subwords
from hf_xent.data.target_noise import TargetNoise
from hf_xent.experiments.study import Study

COPY, NEAREST, METRICS = "the source", "translation of the nearest source", ("BLEU", "chrF")
RATES, WARM, VOCABULARY, HELD = (2e-3, 4e-3), 2 / 3, 1500, 400


def nearest(pairs: mo_pairs.Pairs, sources: list[str]) -> list[str]:
    """The translations of the sources whose character n-grams are most alike."""
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4)).fit(pairs)
    known, targets = vectors.transform(pairs), [*pairs.values()]
    return [targets[i] for i in (vectors.transform(sources) @ known.T).toarray().argmax(1)]


def main(
    folder: Path, language: str = "fr", noises: str = "shuffle:0.5,shuffle:0", parallel: bool = False,
    steps: int = 360, seeds: int = 3, output: Path = Path("out/noisy_translation"),
) -> dict[str, Any]:  # fmt: skip
    """All noises, arms and seeds; returns the results by noise."""
    parts, found = mo_pairs.split(mo_pairs.read(folder, language), HELD), {}
    texts = [f" {text}" for pair in parts.train.items() for text in pair]
    tokenizer = subwords.train(texts, VOCABULARY, "bpe", ("</s>", "<pad>", "<mask>"))
    models: Any = parallel_models if parallel else noisy_models
    options = {"max_steps": steps, "ce_steps": round(WARM * steps)}
    for name in noises.split(","):
        kind, share = name.split(":")[0], float(name.split(":")[1])
        settings = {"language": language, "pairs": len(parts.train), "parallel": parallel, "steps": steps}
        study = Study(name, METRICS, CE, output / name.replace(":", "-"), seeds, settings)

        def noisy(pairs: mo_pairs.Pairs, seed: int, kind: str = kind, share: float = share) -> mo_pairs.Pairs:
            return worse(pairs, TargetNoise(kind, share, seed))

        def trained(arm: str, seed: int, rate: float, study: Study = study, noisy: Any = noisy) -> Any:
            rows, runs = models.rows(tokenizer, noisy(parts.train, seed)), study.output / f"{rate}-{seed}"
            own = {"learning_rate": rate, "seed": seed, **options}
            return models.train(arm, models.new(len(tokenizer), seed), rows, runs, **own)

        def validated(rate: float, trained: Any = trained, noisy: Any = noisy) -> float:
            return trained(CE, 0, rate).evaluate(models.rows(tokenizer, noisy(parts.validation, seeds)))["eval_loss"]

        rate = study.tuned(CE, RATES, validated, higher=False)
        for arm, seed in study.runs([*models.ARMS, COPY, NEAREST]):
            texts = [*parts.test] if arm == COPY else nearest(noisy(parts.train, seed), [*parts.test])
            if arm in models.ARMS:
                texts = models.translated(trained(arm, seed, rate).model, tokenizer, parts.test)
            expected = [[*parts.test.values()]]
            study.record(arm, seed, BLEU=corpus_bleu(texts, expected).score, chrF=corpus_chrf(texts, expected).score)
        found[name] = study.report(f"Made by `examples/noisy_translation.py` of hf_xent; learning rate {rate:g}.")
    return found


if __name__ == "__main__":
    typer.run(main)
