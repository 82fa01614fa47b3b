"""Translations found by the loss of a small language model, over all pairs of real telephone prompts.

    python examples/loss_retrieval.py FOLDER --output out/retrieval [--pairs 24]

FOLDER has `en` and `fr`, each an unpacked Debian package (`dpkg -x asterisk-core-sounds-en_*.deb FOLDER/en`).
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import torch
import typer

from hf_xent.models import loading
from hf_xent.retrieval import GridScorer


def prompts(folder: Path) -> dict[str, str]:
    """Key -> spoken text of one language's prompts; sounds, in brackets, are left out."""
    [file] = sorted(folder.glob("usr/share/doc/asterisk-core-sounds-*/core-sounds-*.txt.gz"))
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    pairs = [line.split(": ", 1) for line in lines if ": " in line and not line.startswith(";")]
    return {key: text for key, said in pairs if (text := re.sub(r"\[[^]]*\]", "", said).strip())}


def main(folder: Path, output: Path = Path("out/retrieval"), pairs: int = 0, dtype: str = "bfloat16") -> None:
    english, french = prompts(folder / "en"), prompts(folder / "fr")
    keys = [key for key in english if key in french]
    chosen = keys[:: len(keys) // pairs][:pairs] if pairs else keys
    model, tokenizer = loading.load("smollm2", getattr(torch, dtype))
    scorer = GridScorer(model, tokenizer, template="French: {}\nEnglish:", target=" {}\n")
    nothing = dict(tokenizer("English:", return_tensors="pt"))
    sources = [nothing, *(french[key] for key in chosen)]
    grid = scorer(sources, [english[key] for key in chosen], output / "grid")
    print(float((grid.sums[1:].argmin(1) == torch.arange(len(chosen)).numpy()).mean()))


if __name__ == "__main__":
    typer.run(main)
