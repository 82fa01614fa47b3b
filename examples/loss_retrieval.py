"""Translations found by the loss of a small language model, over all pairs of real telephone prompts.

    python examples/loss_retrieval.py FOLDER --output out/retrieval [--pairs 24]

FOLDER has `en` and `fr`, each an unpacked Debian package (`dpkg -x asterisk-core-sounds-en_*.deb FOLDER/en`). Every
pair of a French and an English prompt gets S = -log p(English | "French: ... English:") of SmolLM2-135M-Instruct in
bfloat16; nothing is trained and nothing is drawn. What counts, decided beforehand: recall@1 of the English prompts of
a French one by sums, each ranking less `raw`, with a bootstrap interval over queries. Several prompts may be right:
those of equal text. The control of the mutual information is the French of another prompt. `--exact N` scores N sources
in float32, too, and says how often the first raw candidate is the same. An interrupted run goes on.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import typer

from hf_xent.models import loading
from hf_xent.retrieval import RANKINGS, GridScorer, average_precision_at, informed, interval, rank, recall_at
from hf_xent.retrieval.information import others
from hf_xent.system.files import replace_atomically


def prompts(folder: Path) -> dict[str, str]:
    """Key -> spoken text of one language's prompts; sounds, in brackets, are left out."""
    [file] = folder.glob("usr/share/doc/asterisk-core-sounds-*/core-sounds-*.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    pairs = [line.split(": ", 1) for line in lines if ": " in line and not line.startswith(";")]
    return {key: text for key, said in pairs if (text := re.sub(r"\[[^]]*\]", "", said).strip())}


def table(losses: dict[str, np.ndarray], alone: np.ndarray, right: np.ndarray) -> list[str]:
    """A line for each direction, kind of loss and ranking."""
    lines = ["| ranks | loss | ranking | recall@1 | less raw | recall@5 | mAP@10 |", "|---" * 7 + "|"]
    for direction, truth in (("candidates", right), ("sources", right.T)):
        for kind, grid in losses.items():
            first = recall_at(rank(grid, direction=direction), truth)
            for name in [n for n in RANKINGS if n != "pmi" or (kind == "sum" and direction == "candidates")]:
                found = rank(grid, name, direction=direction, alone=alone if name == "pmi" else None)
                hits = recall_at(found, truth)
                values = (hits, hits - first, recall_at(found, truth, 5), average_precision_at(found, truth, 10))
                lines.append("| " + " | ".join([direction, kind, name, *(str(interval(x)) for x in values)]) + " |")
    return lines


def main(folder: Path, output: Path = Path("out/retrieval"), pairs: int = 0, exact: int = 0, model: str = "smollm2"):
    english, french = prompts(folder / "en"), prompts(folder / "fr")
    keys = [key for key in english if key in french]
    keys = keys[:: len(keys) // (pairs or len(keys))][: pairs or None]
    said, source = ([texts[key] for key in keys] for texts in (english, french))
    network, tokenizer = loading.load(model, torch.bfloat16)
    scorer = GridScorer(network, tokenizer, template="French: {}\nEnglish:", target=" {}\n")
    grid = scorer([dict(tokenizer("English:", return_tensors="pt")), *source], said, output / "grid")
    sums, alone, own = grid.sums[1:], grid.sums[0], np.arange(len(said))
    right = np.logical_or(*(np.equal.outer(texts, texts) for texts in (np.array(said), np.array(source))))
    found = informed(sums[own, own], sums[others(len(own)), own], alone, grid.tokens)
    lines = [f"{len(own)} pairs, {grid.tokens.sum()} tokens; chance of recall@1 {right.mean():.4f}.", ""]
    lines += [*table({"sum": sums, "mean": sums / grid.tokens}, alone, right), ""]
    lines += [f"own context: {found.contexts}", f"other context: {found.shuffled}", f"difference: {found.difference}"]
    if exact:
        some = np.linspace(0, len(own) - 1, exact).astype(int)
        scorer = replace(scorer, model=loading.load(model, torch.float32)[0])
        full = scorer([source[i] for i in some], said, output / "float32").sums
        off, same = np.abs(full - sums[some]), (full.argmin(1) == sums[some].argmin(1)).mean()
        lines += [f"{exact} sources in float32: off by {off.mean():.2f} nats, {off.max():.2f} at most; {same:.0%} same"]
    print("\n".join(lines))
    replace_atomically(output / "results.md", lambda draft: draft.write_text("\n".join([*lines, ""])))
    return lines


if __name__ == "__main__":
    typer.run(main)
