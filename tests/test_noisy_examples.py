"""Examples of noisy targets run on tiny data and models, end to end, and run nothing twice."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.models import tiny, tiny_tokenizer

NAMES = (
    "mo_pairs",
    "noisy_models",
    "parallel_models",
    "noisy_translation",
    "short_answers",
    "definitions",
    "noisy_instructions",
)
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
    for name, value in {"HELD": 3, "VOCABULARY": 300, "RATES": (1e-2,)}.items():
        monkeypatch.setattr(module, name, value)
    options = {"steps": 3, "seeds": 1, "noises": "shuffle:1,repeat:0", "output": tmp_path / "out"}
    found = module.main(folder, **options)
    arms = {*models.ARMS, module.COPY, module.NEAREST}
    assert set(found) == {"shuffle:1", "repeat:0"} and all(set(rows) == arms for rows in found.values())
    assert all(0 <= value <= 100 for rows in found.values() for row in rows.values() for value in row[0].values())
    assert found["shuffle:1"][module.COPY] == found["repeat:0"][module.COPY]
    monkeypatch.setattr(models, "train", None)
    assert module.main(folder, **options) == found
    assert module.nearest({"open the file": "a", "save the page": "b"}, ["save this page"]) == ["b"]


def test_instructions(example, tmp_path, monkeypatch):
    """Every arm on answers of a tiny model; the F1 of words and of neighbours."""
    module = example("noisy_instructions")
    rows = [
        {"question": f"what is {i} of {n}", "answer": f"the {n} {m} is a thing {i}"}
        for i in "abc"
        for n, m in NOUNS.items()
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"question": "short", "answer": "no"}])))
    tiny(std=0.05, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer(" ".join(row["answer"] for row in rows)).save_pretrained(tmp_path / "model")
    for name, value in {"HELD": 3, "NEW": 4}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(tmp_path)
    assert len(module.questions(str(tmp_path / "rows.jsonl"))) == 15
    options = {"model": str(tmp_path / "model"), "steps": 2, "seeds": 1, "noises": "1"}
    found = module.main(str(tmp_path / "rows.jsonl"), **options)[1.0]
    assert set(found) == set(module.ARMS) and all(rows[0].keys() == set(module.METRICS) for rows in found.values())
    assert found[module.BEFORE][0]["nll"] != found[module.CE][0]["nll"] != found["EISL + cross-entropy"][0]["nll"]
    assert module.f1(["a", "b", "b"], ["b", "c"]) == pytest.approx(2 * 1 / 5) and module.f1([], []) == 0
    monkeypatch.setattr(module, "run", None)
    assert module.main(str(tmp_path / "rows.jsonl"), **options)[1.0] == found


def test_parallel_models_see_no_target(example, folder, tmp_path, monkeypatch):
    """Masks in place of all targets; what they translate; and a run of both arms."""
    module, models = example("noisy_translation"), example("parallel_models")
    monkeypatch.setattr(example("noisy_models"), "WIDTH", 16)
    monkeypatch.setattr(models, "ARMS", {arm: models.ARMS[arm] for arm in (module.CE, "EISL")})
    monkeypatch.setattr(module.mo_pairs.read, "__defaults__", (1,))
    for name, value in {"HELD": 3, "VOCABULARY": 300, "RATES": (1e-2,)}.items():
        monkeypatch.setattr(module, name, value)
    found = module.main(folder, steps=3, seeds=1, noises="shuffle:1", parallel=True, output=tmp_path / "out")
    assert set(found["shuffle:1"]) == {module.CE, "EISL", module.COPY, module.NEAREST}
    texts = [" open the file", " ouvrir la fichier"]
    tokenizer = module.subwords.train(texts, 270, "bpe", ("</s>", "<pad>", "<mask>"))
    pairs = {"open the file": "ouvrir", "open": "fichier la"}
    [row, other] = models.rows(tokenizer, pairs)
    size = len(tokenizer(" ouvrir")["input_ids"]) + 1
    assert row["input_ids"][-size:] == [models.MASK] * size and row["labels"][:-size] == [-100] * (
        len(row["labels"]) - size
    )
    assert row["position_ids"][-size:] == [*range(size)] and row["token_type_ids"][-size - 1 :] == [0] + [1] * size
    batch = models.collate([row, other])
    wanted, seen = torch.where(batch["labels"] == -100, 0, batch["labels"]), []

    class Knows(torch.nn.Module):
        def forward(self, input_ids, **inputs):
            seen.append(inputs.keys())
            return SimpleNamespace(logits=torch.nn.functional.one_hot(wanted, len(tokenizer)))

    assert models.translated(Knows(), tokenizer, {"open the file": "ouvrir", "open": "fichier la"}) == [
        "ouvrir",
        "fichier la",
    ]
    assert seen == [{"token_type_ids", "position_ids", "attention_mask"}]
