"""Repetition against surprise: is there anything in how Mirostat, top-k and top-p reach a surprise, or only what it is?

    python examples/mirostat_repetition.py [--model smollm2] [--tokens 128] [--rows 12] [--seeds 3]

Basu et al. 2021 (arXiv:2007.14966) report that the repetition of all methods lies on one curve over the surprise, close
to a line until there is none. Every arm continues the same openings of articles of 'wiki', other ones under each seed;
end tokens are excluded. Decided beforehand: the first part fails if, at 1.5, 2.0 or 2.5 bits (linear interpolation
between the arms of a method), the 95 % interval of a method's difference to Mirostat excludes 0; the second if one line
through all arms of at most 3 bits has R^2 below 0.9. Mirostat should keep the spread between the texts small.
"""

from pathlib import Path

import numpy as np
import torch
import typer

from hf_xent.data import load_text
from hf_xent.experiments.study import Study
from hf_xent.generation import mirostat
from hf_xent.metrics import diversity
from hf_xent.models import loading
from hf_xent.system import figures

METRICS, LEVELS, LIMIT, OPENING = ("surprise", "spread", "rep-6"), (1.5, 2.0, 2.5), 3.0, 32  # bits, bits, tokens
METHODS: dict[str, list[dict]] = {
    "Mirostat": [{"target": target} for target in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)],
    "Mirostat 1": [{"target": target, "version": 1} for target in (1.4, 2.0, 2.6)],
    "top-k": [{"top_k": k, "top_p": 1.0} for k in (2, 4, 8, 16, 100)],
    "top-p": [{"top_p": p, "top_k": 0} for p in (0.4, 0.6, 0.7, 0.8, 0.9, 1.0)],
}
ARMS = {f"{method} {next(iter(o.values()))}": o for method, options in METHODS.items() for o in options}


def main(
    model: str = "smollm2", tokens: int = 128, rows: int = 12, seeds: int = 3, output: Path = Path("out/repetition")
) -> dict[str, dict[int, dict[str, float]]]:
    """Every arm under every seed; returns the repetition at equal surprise."""
    study = Study("Repetition", METRICS, "top-p 1.0", output, seeds, {"model": model, "tokens": tokens, "rows": rows})
    lm, tokenizer = loading.load(model)
    texts = tokenizer([text[:999] for text in load_text("wiki")["text"]]).input_ids
    openings = torch.tensor([ids[:OPENING] for ids in texts if len(ids) >= OPENING])
    for arm, seed in study.runs(ARMS):
        ids = openings[np.random.default_rng(seed).choice(len(openings), rows, replace=False)]
        torch.manual_seed(seed)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "temperature": 1.0}
        options |= {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
        sample = mirostat.generate if "target" in ARMS[arm] else type(lm).generate
        found = sample(lm.eval(), ids, **options, **ARMS[arm])
        new = found.sequences[:, OPENING:]
        logp = [x.log_softmax(-1).gather(1, new[:, [i]]) for i, x in enumerate(found.logits)]  # of the whole model
        bits, repeated = -torch.cat(logp, 1).mean(1) / np.log(2), diversity.repetition(new.tolist(), 6)
        study.record(arm, seed, surprise=bits.mean(), spread=bits.std(), **{"rep-6": repeated})
    study.report("Bits a token, their spread between texts, repeated 6-grams; by `examples/mirostat_repetition.py`.")
    return compared(study)


def compared(study: Study) -> dict[str, dict[int, dict[str, float]]]:
    """The methods at equal surprise, and a figure of the repetition and the spread over the surprise."""
    names = tuple(f"rep-6 at {level}" for level in LEVELS)
    equal = Study("Equal surprise", names, "Mirostat", study.output / "equal", study.seeds, study.settings)
    below, (figure, axes) = [], figures.panels(2, 9, 3.6)
    for method, options in METHODS.items():
        arms = [study.results[arm] for arm in ARMS if ARMS[arm] in options]
        points = np.array([[[arm[s][m] for m in METRICS] for arm in arms] for s in range(study.seeds)])
        for seed, (x, _, y) in enumerate(points.transpose(0, 2, 1)):
            found = np.interp(LEVELS, np.sort(x), y[x.argsort()], np.nan, np.nan)
            equal.record(method, seed, **dict(zip(names, found, strict=True)))
        below += [arm[[0, 2]] for arm in points.mean(0) if arm[0] <= LIMIT]
        for axis, column in zip(axes, (2, 1), strict=True):
            axis.plot(*points.mean(0)[:, [0, column]].T, marker="o", markersize=4, label=method)
            axis.set(xlabel="observed surprise, bits a token", ylabel=METRICS[column])
    axes[0].legend()
    figures.save(figure, study.output / "repetition.png")
    r2 = np.corrcoef(np.transpose(below))[0, 1] ** 2 if len(below) > 2 and np.ptp(below, 0).all() else float("nan")
    return equal.report(f"R^2 of one line through the {len(below)} arms of at most {LIMIT} bits: {r2:.3f}.")


if __name__ == "__main__":
    typer.run(main)
