"""The picture of the first page: what it is drawn from, that it is drawn, and that the page has its numbers."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import memory

ROOT = Path(__file__).parents[1]
ROWS = memory.read(ROOT / memory.FILE)


def peaks(name):
    return {int(row["N"]): float(row["peak_mib"]) for row in ROWS if row["contestant"] == name}


def test_the_page_says_what_was_measured():
    ours, tuned = peaks("hf_xent"), peaks("torch chunked tuned")
    assert ours.keys() == {512, 1024, 2048, 4096} and all(peaks(name).keys() == ours.keys() for name in memory.DRAWN)
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    least, most, other = map(int, re.search(r"stays at (\d+) to (\d+) MiB, as does .*? at (\d+)\]", page).groups())
    assert (least, most) == (round(min(ours.values())), round(max(ours.values()))) and other == round(tuned[4096])
    for stock in ("dense", "dense float32 logits", "trl"):  # in proportion to the tokens, beyond what is always there
        growth = peaks(stock)[4096] - peaks(stock)[2048]
        assert growth == pytest.approx(2 * (peaks(stock)[2048] - peaks(stock)[1024]), rel=0.1)


def test_measured_again_takes_the_place_and_both_pictures_are_drawn(tmp_path):
    file = tmp_path / "folder" / "tokens.csv"
    memory.add(ROWS, file)
    assert memory.read(file) == ROWS
    memory.add([{**ROWS[0], "peak_mib": "1000.0"}], file)
    again = memory.read(file)
    assert again[1:] == ROWS[1:] and again[0]["peak_mib"] == "1000.0"
    light, dark = memory.draw(file, tmp_path / "memory.svg")
    pictures = [path.read_text(encoding="utf-8") for path in (light, dark)]
    assert all(ElementTree.fromstring(text).tag.endswith("svg") for text in pictures)
    assert memory.COLORS["light"][2] in pictures[0] and memory.COLORS["dark"][2] in pictures[1]
    committed = [path.relative_to(tmp_path).name for path in (light, dark)]
    assert all((ROOT / "docs" / "assets" / name).is_file() for name in committed)


def test_labels_keep_apart():
    assert memory.spread([100.0, 10.0, 101.0, 1000.0], 2.0) == [100.0, 10.0, 200.0, 1000.0]
    assert memory.spread([10.0, 10.0, 10.0], 1.5) == [10.0, 15.0, 22.5]


@pytest.mark.slow
def test_peaks_of_a_small_head(monkeypatch):
    monkeypatch.setattr(memory, "V", 4096)
    monkeypatch.setattr(memory, "D", 16)
    monkeypatch.setattr(memory, "DRAWN", {name: memory.DRAWN[name] for name in ("dense", "hf_xent")})
    dense, ours = memory.measure(8192)
    assert (dense["contestant"], ours["contestant"]) == ("dense", "hf_xent") and dense["N"] == 8192
    logits = 8192 * 4096 * 2 / 2**20  # MiB of bfloat16
    assert float(dense["peak_mib"]) >= logits > float(ours["peak_mib"])
