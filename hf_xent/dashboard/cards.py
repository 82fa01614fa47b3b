"""A folder's card and pictures as HTML that loads nothing: tags of the card are text, pictures are data URIs."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import MutableMapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .contents import Folder, Picture

TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
"""Suffix of a picture -> its media type."""
MOST, LARGEST = 24, 4 * 2**20
"""The most pictures of a page, and the largest one in bytes."""


def read_card(folder: Folder) -> None:
    """Adds README.md: the front matter as it is, the rest rendered."""
    file = folder.path / "README.md"
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    if match := re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL):
        folder.head, text = match[1], text[match.end() :]
    folder.card = rendered(text, folder.path)
    folder.files.append(file.name)


def rendered(text: str, folder: Path) -> str:
    """Markdown as HTML.

    Args:
        text: Markdown with tables. HTML in it becomes text, but for comments, which are left out.
        folder: Where its pictures are; a picture that is not in there becomes a link.

    Returns:
        HTML that loads nothing from anywhere.
    """
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.add_render_rule("image", _image)
    without_comments = re.sub(r"^<!--.*?-->\n?", "", text, flags=re.DOTALL | re.MULTILINE)
    return str(markdown.render(without_comments, {"folder": folder.resolve()}))


def _image(self: Any, tokens: Sequence[Any], i: int, options: Any, env: MutableMapping[str, Any]) -> str:
    source, folder = str(tokens[i].attrs["src"]), env["folder"]
    alt = escape(tokens[i].content)
    file = (folder / source).resolve()
    if "://" not in source and file.is_relative_to(folder) and (uri := data_uri(file)):
        return f'<img src="{uri}" alt="{alt}">'
    return f'<a href="{escape(source)}">{alt or escape(source)}</a>'


def data_uri(file: Path) -> str | None:
    """A picture as a data URI; None if it is none, or too large."""
    media = TYPES.get(file.suffix.lower())
    if media is None or not file.is_file() or file.stat().st_size > LARGEST:
        return None
    return f"data:{media};base64,{b64encode(file.read_bytes()).decode()}"


def read_pictures(folder: Folder) -> None:
    """Adds the pictures that lie in the folder, and that its card does not show."""
    for file in sorted(folder.path.iterdir()):
        uri = data_uri(file)
        if uri and uri not in folder.card and len(folder.pictures) < MOST:
            folder.pictures.append(Picture(file.name, uri))
            folder.files.append(file.name)
