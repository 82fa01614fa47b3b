"""Examples of noisy targets run on tiny data and models, end to end, and run nothing twice."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

NAMES = ("mo_pairs", "noisy_models", "noisy_translation")
VERBS = {"open": "ouvrir", "close": "fermer", "save": "enregistrer", "print": "imprimer"}
NOUNS = {"file": "fichier", "page": "page", "image": "image", "window": "fenêtre", "table": "tableau"}


def write_mo(file, messages):
    """A file as msgfmt writes it: a header, tables of lengths and offsets, texts that end with a zero byte."""
    texts = [[text.encode() for text in side] for side in zip(*sorted(messages.items()), strict=True)]
    count, start = len(messages), 28
    data, tables = b"", []
    for side in texts:
        for text in side:
            tables.append((len(text), start + 16 * count + len(data)))
            data += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, count, start, start + 8 * count, 0, 0)
    file.parent.mkdir(parents=True)
    file.write_bytes(header + b"".join(struct.pack("<2I", *entry) for entry in tables) + data)


@pytest.fixture
def folder(tmp_path):
    """Twenty pairs that fit, and what does not: another language, placeholders, plurals, a single word, a header."""
    pairs = {f"_{v.title()} the {n}...": f"{w.title()} la {m} :" for v, w in VERBS.items() for n, m in NOUNS.items()}
    others = {"": "Content-Type: text/plain; charset=UTF-8\n", "Open %s file": "Ouvrir %s", "Open": "Ouvrir"}
    write_mo(tmp_path / "mo" / "fr" / "LC_MESSAGES" / "a.mo", pairs | others | {"a file\0files": "un\0deux"})
    write_mo(tmp_path / "mo" / "de" / "LC_MESSAGES" / "a.mo", {"": others[""], "Open it": "Öffnen"})
    return tmp_path / "mo"


@pytest.fixture
def example(monkeypatch, without_progress_bars):
    """An example's module by name; sacrebleu, which only the published run needs, is the share of right words here."""

    def right(texts, references):
        return SimpleNamespace(score=100 * sum(map(str.__eq__, texts, references[0])) / len(texts))

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.setitem(sys.modules, "sacrebleu", SimpleNamespace(corpus_bleu=right, corpus_chrf=right))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__
    for name in NAMES:
        sys.modules.pop(name, None)


def test_pairs_are_messages_and_their_translations(example, folder):
    mo_pairs = example("mo_pairs")
    pairs = mo_pairs.read(folder, "fr", often=4)
    assert len(pairs) == 20 and pairs["open the window"] == "ouvrir la fenêtre"
    assert not mo_pairs.fits("open the file", "open the file") and mo_pairs.spelled("&Save _As…") == "save as"
    parts = mo_pairs.split(pairs, 3)
    assert [*map(len, parts)] == [14, 3, 3] and {**parts.train, **parts.validation, **parts.test} == pairs
    with pytest.raises(ValueError, match="which has no pairs of 'de'"):
        mo_pairs.read(folder, "de")
    with pytest.raises(ValueError, match="which has no pairs of 'fr'"):
        mo_pairs.read(folder, "fr", often=6)


def test_translation(example, folder, tmp_path, monkeypatch):
    """Three arms at two noises, from the same first steps; a second call finds all results."""
    module, models = example("noisy_translation"), example("noisy_models")
    monkeypatch.setattr(models, "WIDTH", 16)
    for name in ("EISL", "EISL + cross-entropy", "cross-entropy, own inputs", "label smoothing"):
        monkeypatch.delitem(models.ARMS, name)
    monkeypatch.setattr(module.mo_pairs.read, "__defaults__", (1,))
    for name, value in {"HELD": 3, "VOCABULARY": 300, "RATES": (1e-2, 1e-3)}.items():
        monkeypatch.setattr(module, name, value)
    options = {"steps": 3, "seeds": 1, "noises": "1,0", "output": tmp_path / "out"}
    found = module.main(folder, **options)
    assert set(found) == {0.0, 1.0} and all(
        set(rows) == {*models.ARMS, module.COPY, module.NEAREST} for rows in found.values()
    )
    assert all(0 <= value <= 100 for rows in found.values() for row in rows.values() for value in row[0].values())
    assert found[1.0][module.COPY] == found[0.0][module.COPY]
    monkeypatch.setattr(module, "train", None)
    assert module.main(folder, **options) == found
    assert module.nearest({"open the file": "a", "save the page": "b"}, ["save this page"]) == ["b"]
