"""Examples of words and their tags: sizes of encoder and decoder, information of words, and pre-training."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from hf_xent import laws
from hf_xent.data.brown import CORPUS, tagged_sentences

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("word_tags", "tag_models", "tag_pretraining", "encoder_decoder_law", "encoder_decoder_sizes",
         "tag_information", "downstream_law")  # fmt: skip
WORDS = [["the/at", "a/at", "this/dt"], ["dog/nn", "Fox/nn-tl", "town/nn"], ["runs/vbz", "ran/vbd", "is/bez"],
         ["quick/jj", "red/jj-hl", "--/--"]]  # fmt: skip
TINY = pytest.mark.filterwarnings("ignore:.* may be wrong by a factor of:UserWarning")  # a few steps determine no law


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six documents of 60 sentences of four or five words; two of them, ca05 and ca10, are held out."""
    folder, draw = tmp_path_factory.mktemp("brown"), np.random.default_rng(0)
    for number in (1, 2, 3, 4, 5, 10):
        order = [0, 3, 1, 2, 3]
        lines = [" ".join(str(draw.choice(WORDS[i])) for i in order[: 4 + n % 2]) + " ./." for n in range(60)]
        (folder / f"ca{number:02}").write_text("\n".join(f"\t{line}" for line in lines))
    return f"brown:{folder}"


@pytest.fixture
def example(monkeypatch):
    """An example's module by name, of a small and fast task; what it changes is undone."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import word_tags

    small = {"WORDS": 8, "TAGS": 6, "TEST": 40, "OTHER": 11, "SIZE": 18}
    for name, value in small.items():
        monkeypatch.setattr(word_tags, name, value)
    yield __import__
    for name in NAMES:
        sys.modules.pop(name, None)


def test_tagged_sentences_are_words_and_tags():
    """The tag of every word, on a text as it is published."""
    row = CORPUS.row({"name": "ca01", "tagged": "\n\n\tThe/at F.B.I./np 1/2/cd said/vbd-tl ./.\n\n\tNo/rb --/--\n"})
    first, second = tagged_sentences(row)
    assert first == (["The", "F.B.I.", "1/2", "said", "."], ["at", "np", "cd", "vbd-tl", "."])
    assert second == (["No", "--"], ["rb", "--"])


def test_word_tags_holds_documents_out_and_names_rare_words(example, source):
    """Ids by frequency; words in lower case, tags without places."""
    word_tags = example("word_tags")
    assert word_tags.spelled((["The", "--"], ["at-tl", "--"])) == (["the", "--"], ["at", "--"])
    data = word_tags.WordTags(source)
    assert len(data.train) == 240 and len(data.test) == 40 and len(data.words) == 8 and len(data.tags) == 6
    assert next(iter(data.words)) == "." and data.words["."] == word_tags.UNKNOWN + 1
    row = data.row([".", "nonsense"], [".", "zz"])
    assert row == {"input_ids": [3, word_tags.UNKNOWN, word_tags.END], "labels": [data.tags["."], word_tags.OTHER]}
    assert max(max(row["labels"]) for row in data.train) < word_tags.SIZE
    batch = word_tags.collate([row, {"input_ids": [5, 1], "labels": [12]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] and batch["labels"][1].tolist() == [12, -100]


def test_losses_are_those_of_dense_logits(example, source):
    """Sums of each row, in batches that are padded, against log-softmax; and what training does to them."""
    word_tags, tag_models = example("word_tags"), example("tag_models")
    data = word_tags.WordTags(source)
    model = tag_models.new(8, 16, seed=0)
    found = tag_models.measured(model, data.test, batch=7)
    for row, total in zip(data.test, found.sums, strict=True):
        batch = word_tags.collate([row])
        start = torch.tensor([[word_tags.PAD, *row["labels"][:-1]]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], decoder_input_ids=start).logits
        dense = -torch.log_softmax(logits[0].double(), -1).gather(1, batch["labels"].T).sum().item()
        assert total == pytest.approx(dense, rel=1e-4)
    assert found.mean == pytest.approx(found.sums.sum() / sum(len(row["labels"]) for row in data.test))
    attention = model.model.decoder.layers[0].encoder_attn
    assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)


@TINY
def test_sizes_and_information_resume(example, source, tmp_path, monkeypatch):
    """Every model is trained once; forecasts are those of laws.fit; the models that were kept are measured again."""
    sizes, tag_models, information = map(example, ("encoder_decoder_sizes", "tag_models", "tag_information"))
    names = {f"encoder {e}, decoder {d}": (e, d) for e in (8, 64, 320) for d in (8, 64, 320)}
    for name, value in {"NAMES": names, "HELD": [(320, 320), (8, 64)], "KEPT": (64, 64)}.items():
        monkeypatch.setattr(sizes, name, value)
    monkeypatch.setattr(information, "KEPT", (64, 64))
    monkeypatch.setattr(example("encoder_decoder_law"), "DRAWS", 10)
    law, real, trained = laws.EncoderDecoder(alpha=0.02, pe=0.2, pd=0.6, floor=0.5), sizes.cell, []

    def cell(data, widths, steps, seed, output):  # two steps learn nothing: the losses are those of a law
        trained.append(widths)
        row = real(data, widths, steps, seed, output)
        return row | {"loss": float(law.predict(encoder=row["encoder"], decoder=row["decoder"]))}

    monkeypatch.setattr(sizes, "cell", cell)
    options = {"source": source, "steps": 1, "seeds": 1, "output": tmp_path / "sizes"}
    found = sizes.main(**options)
    assert list(found) == [sizes.LAW, sizes.SUM, sizes.LARGEST, sizes.MEAN] and trained == list(names.values())
    assert all(set(rows[0]) == set(sizes.METRICS) for rows in found.values())
    assert max(found[sizes.LAW][0].values()) < 0.1 < 1 < min(found[arm][0]["mean %"] for arm in (sizes.SUM, sizes.MEAN))
    card = (tmp_path / "sizes" / "README.md").read_text()
    assert "best share of the encoder 0.25" in card and "NOT translation" in card
    assert "Slopes: encoder -0.1" in card and ", decoder -0.3" in card
    fit = laws.Fit.read(tmp_path / "sizes" / "fit.json")
    assert fit.interval_from(lambda law: law.pe) == fit.intervals["pe"]
    assert (tmp_path / "sizes" / "grid.png").exists()
    assert sizes.main(**options) == found and len(trained) == len(names), "nothing is trained twice"

    options = {"source": source, "steps": 1, "seeds": 1, "output": tmp_path / "information"}
    with pytest.raises(ValueError, match="has no seed-0: run encoder_decoder_sizes"):
        information.main(**options, models=tmp_path)
    found = information.main(**options, models=tmp_path / "sizes" / "models")
    for row in (rows[0] for rows in found.values()):
        assert row["information"] == pytest.approx(row["alone"] - row["given"], abs=1e-9)
        assert row["infogain"] == pytest.approx(row["information"] / row["alone"])
        assert row["low"] <= row["information"] <= row["high"]
    assert found[information.WORDS][0]["alone"] == found[information.CONTROL][0]["alone"]
    monkeypatch.setattr(tag_models, "train", None)  # would fail
    assert information.main(**options, models=tmp_path) == found


def test_slopes_are_those_of_least_squares(example):
    """Against SciPy's regression in one size with the other fixed; a law that is refused leaves them in the summary."""
    law = example("encoder_decoder_law")
    encoder, decoder = (grid.ravel() for grid in np.meshgrid([1e3, 1e4, 1e5], [2e3, 8e3, 4e4]))
    loss = 3 * encoder**0.04 * decoder**-0.2 * np.exp(0.01 * np.random.default_rng(0).standard_normal(9))
    one, other = linregress(np.log(encoder), np.log(loss)), linregress(np.log(decoder), np.log(loss))
    text = law.slopes(np.column_stack([encoder, decoder, loss]))
    assert f"encoder {one.slope:+.3f} ±" in text and f"decoder {other.slope:+.3f} ±" in text  # the sizes are orthogonal
    summary = law.summary(np.column_stack([encoder, decoder, loss]), Path())
    assert summary == f"No law of all losses: pe goes to 0, {summary.partition('0, ')[2]}" and summary.endswith(text)


def test_swapped_words_are_those_of_another_sentence_of_the_length(example):
    information = example("tag_information")
    rows = [{"input_ids": [i] * length, "labels": [i] * length} for i, length in enumerate((3, 4, 3, 4, 3))]
    swapped = information.swapped(rows)
    assert [row["labels"] for row in swapped] == [row["labels"] for row in rows]
    words = [row["input_ids"][0] for row in swapped]
    assert sorted(words) == list(range(5)) and all(word != i for i, word in enumerate(words))
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in swapped)


@TINY
def test_downstream_law_resumes(example, source, tmp_path, monkeypatch):
    """Weights are kept after all steps that count, in one run; forecasts are those of laws.fit; it resumes."""
    pretraining, tag_models = example("tag_pretraining"), example("tag_models")
    words = [96, 192, 288, 384, 576]
    for name, value in {"STEPS": (1, 2, 3, 4, 6), "WORDS": words, "WIDTH": 8}.items():
        monkeypatch.setattr(pretraining, name, value)
    monkeypatch.setattr(tag_models, "BATCH", 8)
    downstream, data = example("downstream_law"), example("word_tags").WordTags(source)
    kept = pretraining.pretrained(data.text, False, 0, str(tmp_path))
    assert len(kept) == 5 and not any(torch.equal(a["lm_head.weight"], b["lm_head.weight"]) for a, b in pairwise(kept))
    with pytest.raises(ValueError, match="text has 5 pieces, and 6 steps read more"):
        pretraining.pretrained(data.text[:60], False, 0, str(tmp_path))

    monkeypatch.setattr(downstream, "pretrained", lambda text, shuffled, seed, output: kept)
    found = downstream.results(data, downstream.CONTROL, 1, 0, str(tmp_path))
    assert list(found) == [f"{kind} {count}" for count in words for kind in ("loss", "score")]
    assert len(set(found.values())) > 5 and all(0 <= found[f"score {count}"] <= 100 for count in words)
    assert list(downstream.results(data, downstream.NOTHING, 1, 0, str(tmp_path))) == ["loss 0", "score 0"]

    truth = {"loss": laws.DownstreamLoss(E=0.5, A=9, alpha=0.5), "score": laws.LogLaw(A=0.5, alpha=1, beta=2)}
    runs = []

    def results(data, arm, steps, seed, output):  # those of the laws, and noise in the control
        runs.append((arm, seed))
        noise = np.random.default_rng(seed).uniform(0.5, 1.5, len(words)) if arm == downstream.CONTROL else 1
        values = {kind: noise * law.predict(tokens=words) for kind, law in truth.items()}
        return {f"{kind} {n}": float(x) for kind, row in values.items() for n, x in zip(words, row, strict=True)}

    monkeypatch.setattr(downstream, "results", results)
    options = {"source": source, "seeds": 2, "output": tmp_path / "out"}
    found = downstream.main(**options)
    assert len(runs) == 6 and list(found) == [downstream.LAW, downstream.LAST, downstream.MEAN]
    for kind, law in truth.items():
        column, (*_, before, last) = f"{kind} %, {downstream.ALIGNED}", law.predict(tokens=words)
        assert found[downstream.LAW][1][column] < 0.01
        assert found[downstream.LAST][1][column] == pytest.approx(100 * abs(before / last - 1))
    assert str(downstream.main(**options)) == str(found) and len(runs) == 6, "nothing is run twice"
    refused = downstream.forecast(downstream.LAW, "downstream", [1.0] * 4)
    assert np.isnan(refused)


def test_pieces_hide_words_and_shuffle_them(example):
    pretraining = example("tag_pretraining")
    text = list(range(100, 100 + 12 * 400 + 5))
    for shuffled in (False, True):
        rows = pretraining.pieces(text, shuffled, seed=0)
        assert sorted(word for row in rows for word in row["labels"]) == text[:-5]
        read = np.array([row["input_ids"] for row in rows])
        whole = np.array([row["labels"] for row in rows])
        hidden = read == 2
        assert np.array_equal(read[~hidden], whole[~hidden]) and 0.27 < hidden.mean() < 0.33
        assert (np.ptp(whole, axis=1) == 11).all(), "a piece is one stretch of the text"
        assert (np.diff(whole) == 1).all() != shuffled
