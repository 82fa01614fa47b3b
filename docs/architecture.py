"""Draw the rooms of the package by floor, and their imports, into docs/architecture.svg: `make architecture`.

The floors come from the table in CONTRIBUTING.md, the imports from the source files; no module is imported.
"""

from __future__ import annotations

import ast
import colorsys
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_xent"
PICTURE = Path(__file__).with_suffix(".svg")
WIDTH, FLOOR, LEFT, BOX = (
    1180,
    122,
    40,
    30,
)  # points: width of the picture, height of a floor, left margin, height of a box


def floors() -> dict[int, list[str]]:
    """Floor -> its rooms, from the top floor down."""
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {int(floor): re.findall(r"`(\w+)`", rooms) for floor, rooms in rows}


def room_of(module: str) -> str:
    """The room of a module: `ops` for `hf_xent.ops.tail`, and `hf_xent` for the package itself."""
    module = module.removesuffix(".__main__")
    return module.split(".")[min(1, module.count("."))]


def imports(path: Path) -> Iterator[str]:
    """Modules of the package, or names in them, that a file imports on any of its lines."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parents = parts[:-1]  # the package that relative imports start from
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "hf_xent")
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else ()
            base = ".".join((*start, *filter(None, [node.module])))
            if base.partition(".")[0] == "hf_xent":
                yield from (f"{base}.{alias.name}" for alias in node.names)


def edges() -> set[tuple[str, str]]:
    """Pairs of rooms, the first of which imports something from the second."""
    rooms = {room for level in floors().values() for room in level}
    pairs = set()
    for path in PACKAGE.rglob("*.py"):
        importer = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        pairs |= {(importer, room) for room in map(room_of, imports(path)) if room in rooms and room != importer}
    return pairs


def draw() -> str:
    """The picture as SVG text; the path of an edge names its two rooms as data-from and data-to."""
    height = FLOOR * len(floors())
    boxes, lines = {}, []
    for row, (floor, rooms) in enumerate(floors().items()):
        y = row * FLOOR + 24
        fill = "#f4f6f8" if row % 2 else "#e9edf1"
        lines.append(f'<rect x="0" y="{row * FLOOR}" width="{WIDTH}" height="{FLOOR}" fill="{fill}"/>')
        lines.append(f'<text x="14" y="{y + 20}" class="floor">{floor}</text>')
        space = (WIDTH - LEFT) / len(rooms)
        boxes |= {room: (round(LEFT + space * (column + 0.5)), y) for column, room in enumerate(rooms)}
    colors = {room: _color(index / len(boxes)) for index, room in enumerate(boxes)}
    lines += [_edge(boxes, importer, imported, colors[importer]) for importer, imported in sorted(edges())]
    for room, (x, y) in boxes.items():
        size = f'x="{x - 52}" y="{y}" width="104" height="{BOX}" rx="6"'
        lines.append(f'<rect {size} fill="white" stroke="{colors[room]}" stroke-width="2"/>')
        lines.append(f'<text x="{x}" y="{y + 20}" class="room">{room}</text>')
    style = "text{font:14px sans-serif;fill:#222}.room{text-anchor:middle}.floor{font-weight:bold}path{fill:none}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join((start, f"<style>{style}</style>", *lines, "</svg>", ""))


def _color(hue: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue, 0.42, 0.65)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _edge(boxes: dict[str, tuple[int, int]], importer: str, imported: str, color: str) -> str:
    """A curve from the bottom of one box to the top of another, or below both on one floor, with a dot at its end."""
    (x, y), (to, end) = boxes[importer], boxes[imported]
    y += BOX
    down = end > y
    end += 0 if down else BOX
    bend = max(40, (end - y) // 2) if down else 48
    path = f"M{x} {y}C{x} {y + bend} {to} {end + (-bend if down else bend)} {to} {end}"
    return (
        f'<path data-from="{importer}" data-to="{imported}" d="{path}" stroke="{color}" stroke-opacity="0.6"'
        f' stroke-width="1.4"/><circle cx="{to}" cy="{end}" r="3" fill="{color}"/>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
