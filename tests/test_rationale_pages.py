"""Pages of rationales: every text is on them as it is, and words have the weights of their tokens."""

from html.parser import HTMLParser

import pytest
import torch
from transformers import BertConfig

from hf_xent.localization import Rationale, RationaleConfig, TextRationale, explain, rationale_html
from support.models import tiny_tokenizer

HOSTILE = '<script>alert("1")</script> & caf\u00e9\'s <b>\u65e5\u672c'


class Reader(HTMLParser):
    """The texts of a page, the words that are marked in them, and the tags it has."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.marks, self.tags, self.heads, self.inside = [], [], set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.inside.append((tag, attributes))
        if tag == "p" and attributes.get("class") == "text":
            self.texts.append("")
        if tag == "p" and attributes.get("class") == "head":
            self.heads.append("")

    def handle_endtag(self, tag):
        while self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        kinds = [attributes.get("class") for _, attributes in self.inside]
        if "text" in kinds:
            self.texts[-1] += data
            tag, attributes = self.inside[-1]
            if tag == "mark":
                self.marks.append((data, attributes["title"], attributes.get("class")))
        if "head" in kinds:
            self.heads[-1] += data


def test_a_page_has_the_texts_as_they_are():
    one = TextRationale.of(HOSTILE, [(0, 0), (1, 7), (30, 36)], [0, 0.25, 0.75], "<a>", 0.5, "b&c")
    other = TextRationale.of("two\n lines", [(0, 3)], [1.0], "x", 1.0, "x")
    page = rationale_html([one, other], "T <i>")
    found = Reader(page)
    assert found.texts == [HOSTILE, "two\n lines"]
    assert found.marks == [("script", "0.25", None), ("caf\u00e9's", "0.75", "in"), ("two", "1.00", "in")]
    assert found.heads == ["<a> with probability 0.50; right is b&c", "x with probability 1.00, which is right"]
    assert not found.tags & {"script", "link", "img", "i", "svg"} and "http" not in page and "url(" not in page
    assert page.count("T &lt;i&gt;") == 2 and "prefers-color-scheme:dark" in page


def test_words_have_the_largest_weight_of_their_tokens():
    text = "un believable, ok unseen"
    tokens = {(0, 2): 0.1, (2, 6): 0.2, (6, 9): 0.9, (9, 13): 0.3, (13, 14): 0.05, (15, 16): 0.6, (16, 17): 0.5}
    found = TextRationale.of(text, [(0, 0), *tokens], [1.0, *tokens.values()], "x", 1.0)
    assert [(text[s:e], w) for s, e, w in found.words] == [
        ("un", 0.1), ("believable", 0.9), (",", 0.05), ("ok", 0.6), ("unseen", 0.0)
    ]  # fmt: skip


def test_a_model_explains_texts_in_any_batch():
    texts = ["the fox", "the dog jumps over the fox again", "fox"]
    tokenizer = tiny_tokenizer(" ".join(texts))
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=len(tokenizer), id2label={0: "no", 1: "yes"}, initializer_range=0.3, **sizes)
    model = Rationale(RationaleConfig(config, special_ids=[tokenizer.pad_token_id])).train()
    found = explain(model, tokenizer, texts, ["no", "yes", "no"])
    assert model.training and [one.text for one in found] == texts
    single = explain(model, tokenizer, texts, batch_size=1)
    for one, other in zip(found, single, strict=True):
        assert one.label == other.label and one.probability == pytest.approx(other.probability, abs=1e-5)
        assert [w for *_, w in one.words] == pytest.approx([w for *_, w in other.words], abs=1e-5)
        assert other.truth is None and max(w for *_, w in one.words) > 0
    cut = explain(model, tokenizer, texts[1:2], max_length=2)[0]
    assert cut.words[-1][2] == 0
    with pytest.raises(ValueError, match="truth has 1 classes for 3 texts"):
        explain(model, tokenizer, texts, ["no"])


def test_bad_inputs():
    with pytest.raises(ValueError, match="offsets has 1 tokens and weights 2"):
        TextRationale.of("a", [(0, 1)], [0.5, 0.5], "x", 1.0)
    with pytest.raises(ValueError, match=r"weights has 1\.5"):
        TextRationale.of("a", [(0, 1)], [1.5], "x", 1.0)
    with pytest.raises(ValueError, match="threshold is 2"):
        rationale_html([], threshold=2)
