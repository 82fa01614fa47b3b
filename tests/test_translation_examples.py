"""Examples of words and their tags: sizes of encoder and decoder, information of words, and pre-training."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_xent import laws
from hf_xent.data.brown import CORPUS, tagged_sentences

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("word_tags", "tag_models", "tag_pretraining", "encoder_decoder_sizes", "tag_information", "downstream_law")
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
    """All models once; forecasts are those of laws.fit; information reads the kept models."""
    sizes, tag_models = example("encoder_decoder_sizes"), example("tag_models")
    information = example("tag_information")
    widths = (8, 32, 96)
    names = {f"encoder {e}, decoder {d}": (e, d) for e in widths for d in widths}
    for name, value in {"NAMES": names, "HELD": [(96, 96), (32, 8)], "KEPT": (32, 32)}.items():
        monkeypatch.setattr(sizes, name, value)
    monkeypatch.setattr(information, "KEPT", (32, 32))
    losses = iter(1 + 0.5 * np.outer(np.array([1, 2, 3]) ** -0.4, np.array([1, 2, 3]) ** -0.9).ravel())
    real = tag_models.measured
    made = []

    def measured(model, rows):
        made.append(model)
        found = real(model, rows)
        return found._replace(sums=found.tokens * next(losses))

    monkeypatch.setattr(tag_models, "measured", measured)
    options = {"source": source, "steps": 2, "seeds": 1, "output": tmp_path / "sizes"}
    found = sizes.main(**options)
    assert len(made) == 9 and set(found) == {sizes.LAW, sizes.SUM, sizes.LARGEST, sizes.MEAN}
    assert sizes.main(**options) == found and len(made) == 9, "nothing is trained twice"
