"""Sub-word vocabularies: what they keep of a text, the paths through its pieces, and the likelihood of all of them."""

import itertools
import json
import math
import random
import runpy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from hf_xent import unpatch
from hf_xent.data import subwords
from hf_xent.data.segmentation import Segmenter, shortest_path
from hf_xent.data.subwords import encode, likelihood, train

GOLDEN = {"a": 0.1, "b": 0.1, "c": 0.1, "ab": 0.2, "bc": 0.3, "abc": 0.05}
PIECES = {piece: math.log(p) for piece, p in GOLDEN.items()}
TEXTS = [
    "The rain had stopped, and the streets were wet; nobody walked there.",
    "The train stopped in the rain. Nobody had walked to the station, and nobody waited there.",
    "Streets and stations are where people walk and wait, and where the rain stops nobody.",
] * 3
SIZE = 270
ODD = [
    "",
    " ",
    "\n\n\ttabs\r\n and  two spaces ",
    "emoji 🙂👩‍👩‍👧 and flags 🇫🇷",
    "cafe\u0301 is not café; \u200bzero width, \ufeff and \x00",
    "日本語 العربية ไทย",
    "##ing <0x0A> ▁ Ġ",
    "x" * 300,
    "the rain <|endoftext|> had",
]


@pytest.fixture(scope="module")
def tokenizers():
    return {algorithm: train(TEXTS, SIZE, algorithm) for algorithm in subwords.ALGORITHMS}


def every_cut(text):
    """All ways to cut a text, as tuples of its parts."""
    for inside in range(len(text)):
        for cuts in itertools.combinations(range(1, len(text)), inside):
            yield tuple(text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)]))


def costs_of(pieces, text):
    """Way to cut -> its cost, of the ways that the pieces allow."""
    cuts = [cut for cut in every_cut(text) if all(piece in pieces for piece in cut)]
    return {cut: -sum(pieces[piece] for piece in cut) for cut in cuts}


def random_pieces(draw):
    """All letters, and some of the longer strings of three letters; of a few scores, so that paths tie."""
    strings = ["".join(letters) for n in (2, 3, 4) for letters in itertools.product("abc", repeat=n)]
    letters = {letter: -draw.choice([0.5, 1.0]) for letter in "abc"}
    return letters | {piece: -draw.choice([0.5, 1.0, 1.5, 2.0, 4.0]) for piece in draw.sample(strings, 20)}


@pytest.mark.parametrize(
    ("text", "most", "pieces", "cost"),
    [
        ("abc", None, ("abc",), 2.995732),
        ("abcbc", None, ("abc", "bc"), 4.199705),
        ("abc", 1, ("abc",), 2.995732),
        ("", None, (), 0.0),
        ("", 0, (), 0.0),
    ],
)
def test_shortest_paths_of_the_sheet(text, most, pieces, cost):
    found = shortest_path(PIECES, text, most)
    assert found.pieces == pieces
    assert found.cost == pytest.approx(cost, abs=1e-6)


def test_costs_of_all_cuts_of_the_sheet():
    costs = costs_of(PIECES, "abc")
    golden = {("abc",): 2.995732, ("a", "bc"): 3.506558, ("ab", "c"): 3.912023, ("a", "b", "c"): 6.907755}
    assert costs == pytest.approx(golden, abs=1e-6)
    without = {piece: score for piece, score in PIECES.items() if piece != "abc"}
    assert shortest_path(without, "abc") == (("a", "bc"), pytest.approx(3.506558, abs=1e-6))
    assert shortest_path(PIECES | {"abc": -math.inf}, "abc").pieces == ("a", "bc")  # not used


def test_the_path_is_that_of_tokenizers():
    """Random vocabularies and texts; the scores tie often."""
    draw = random.Random(0)
    for _ in range(60):
        pieces = random_pieces(draw)
        engine = Tokenizer(models.Unigram([("<unk>", -20.0), *pieces.items()], unk_id=0))
        for _ in range(5):
            text = "".join(draw.choices("abc", k=draw.randrange(1, 30)))
            assert list(shortest_path(pieces, text).pieces) == engine.encode(text).tokens


def test_bounded_paths_and_sums_are_those_of_enumeration():
    draw, bound = random.Random(1), 0
    for _ in range(20):
        pieces = random_pieces(draw)
        text = "".join(draw.choices("abc", k=draw.randrange(2, 10)))
        costs = costs_of(pieces, text)
        assert shortest_path(pieces, text).cost == pytest.approx(min(costs.values()))
        total = math.log(sum(math.exp(-cost) for cost in costs.values()))
        assert Segmenter(pieces).summed([text]) == pytest.approx(total, abs=1e-12)
        fewest, free = min(map(len, costs)), shortest_path(pieces, text)
        for most in range(fewest, len(text) + 1):
            found = shortest_path(pieces, text, most)
            assert found.cost == pytest.approx(min(cost for cut, cost in costs.items() if len(cut) <= most))
            assert costs[found.pieces] == pytest.approx(found.cost)
            assert len(found.pieces) <= most
            assert found == free or len(free.pieces) > most  # what is kept changes nothing
            bound += found != free
        with pytest.raises(ValueError, match=f"takes {fewest} pieces"):
            shortest_path(pieces, text, fewest - 1)
    assert bound > 10


def test_bounded_paths_that_tie_have_the_fewest_pieces():
    pieces = {"a": -1.0, "aa": -3.0, "aaa": -4.0}
    assert shortest_path(pieces, "aaaa").pieces == ("a",) * 4
    assert shortest_path(pieces, "aaaa", 3).pieces == ("a", "aaa")  # a|a|aa and aaa|a cost 5, too
    assert shortest_path(pieces, "aaaa", 3).cost == 5.0


@pytest.mark.parametrize(
    ("pieces", "text", "most", "message"),
    [
        (PIECES, "abd", None, "text is 'abd', which the pieces do not make up"),
        ({}, "a", None, "text is 'a', which"),
        ({"a": 0.1}, "a", None, "pieces has 'a' with the log-probability 0.1"),
        ({"a": math.nan}, "a", None, "pieces has 'a' with the log-probability nan"),
        ({"": -1.0}, "a", None, "pieces has '' with"),
        (PIECES, "abcabc", 1, "most is 1, but 'abcabc' takes 2 pieces: choose at least that many"),
        (PIECES, "abc", 0, "most is 0, but 'abc' takes 1 pieces"),
        (PIECES, "abc", 1.5, "most is 1.5: choose a whole number"),
    ],
)
def test_paths_that_do_not_exist(pieces, text, most, message):
    with pytest.raises(ValueError, match=message) as error:
        shortest_path(pieces, text, most)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", subwords.ALGORITHMS)
def test_every_text_comes_back(tokenizers, algorithm, tmp_path):
    """Also from the folder that AutoTokenizer reads, with the same ids."""
    tokenizer = tokenizers[algorithm]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(again) == tokenizer.vocab_size == SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))
    assert again.eos_token == again.bos_token == again.pad_token == subwords.END
    for text in [*ODD, *TEXTS[:3]]:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == again.decode(ids) == text
    assert tokenizer(ODD[-1])["input_ids"].count(tokenizer.eos_token_id) == 1
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0].encode())
    batch = again(["the rain", "the rain had stopped"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).min() < batch["input_ids"].shape[1]


def test_algorithms_differ_in_what_they_say(tokenizers):
    """WordPiece has the tokens of BPE, and takes the longest first."""
    words, merges = tokenizers["wordpiece"], tokenizers["bpe"]
    assert words.get_vocab().keys() == merges.get_vocab().keys() != tokenizers["unigram"].get_vocab().keys()
    vocabulary = words.get_vocab()
    for text in (TEXTS[0], "nobody walks", "stationary"):
        expected = []
        for word, _ in words.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
            while word:
                expected.append(next(word[:n] for n in range(len(word), 0, -1) if word[:n] in vocabulary))
                word = word[len(expected[-1]) :]
        assert words.tokenize(text) == expected
    assert not any(token.startswith("##") for token in vocabulary)
    assert {len(t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXTS[0])) for t in tokenizers.values()} == {15}


@pytest.mark.parametrize("algorithm", subwords.ALGORITHMS)
def test_the_same_texts_give_the_same_vocabulary(tokenizers, algorithm):
    again = train(iter(TEXTS), SIZE, algorithm)
    assert again.backend_tokenizer.to_str() == tokenizers[algorithm].backend_tokenizer.to_str()


def test_special_tokens_are_counted(tokenizers):
    tokenizer = train(TEXTS, SIZE, "bpe", ["<eos>", "<mask>"])
    assert len(tokenizer) == SIZE
    assert tokenizer.eos_token == "<eos>"
    assert {"<eos>", "<mask>"} <= {*tokenizer.all_special_tokens}
    assert tokenizer.decode(tokenizer("a<mask>b")["input_ids"], skip_special_tokens=True) == "ab"
    assert train(TEXTS, 257, "bpe").tokenize("rain") == [*"rain"]  # the bytes alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEXTS, SIZE, "sentencepiece"), "algorithm is 'sentencepiece': choose one of unigram, bpe, wordpiece"),
        ((TEXTS, 256, "bpe"), "size is 256: choose a whole number of at least 257"),
        ((TEXTS, 257, "unigram"), "size is 257: choose a whole number of at least 258"),
        ((TEXTS, 300.5, "bpe"), "size is 300.5: choose a whole number"),
        ((TEXTS, 20_000, "bpe"), r"size is 20000, but bpe finds \d+ tokens here: choose that or less, or add texts"),
        ((TEXTS, 20_000, "unigram"), r"size is 20000, but unigram finds \d+ tokens here"),
        (([], SIZE), "texts are empty"),
        ((["", ""], SIZE), "texts are empty"),
        (("a text", SIZE), "texts is 'a text', a single text: pass a list"),
        ((TEXTS, SIZE, "bpe", "<eos>"), "special is '<eos>': pass a list"),
        ((TEXTS, SIZE, "bpe", []), r"special is \[\]: pass a list"),
        ((TEXTS, SIZE, "bpe", ["<a>", "<a>"]), "special is .*: pass a list of different tokens"),
    ],
)
def test_vocabularies_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        train(*arguments)
    assert "\n" not in str(error.value)


def test_likelihood_is_that_of_all_cuts_of_the_words(tokenizers):
    tokenizer = tokenizers["unigram"]
    scores = scores_of(tokenizer)
    mass = math.log(sum(map(math.exp, scores.values())))
    scores = {piece: score - mass for piece, score in scores.items()}
    texts = ["the rain", "nobody, é"]
    words = ["the", "Ġrain", "nobody", ",", "ĠÃ©"]
    found = likelihood(tokenizer, texts)
    costs = [costs_of(scores, word) for word in words]
    assert found.summed == pytest.approx(sum(math.log(sum(math.exp(-c) for c in word.values())) for word in costs))
    assert found.summed > found.best
    assert found.tokens == sum(map(len, tokenizer(texts)["input_ids"]))
    ids = [*itertools.chain.from_iterable(tokenizer(texts)["input_ids"])]
    assert found.best == pytest.approx(sum(scores[token] for token in tokenizer.convert_ids_to_tokens(ids)))
    assert found.bytes == 18
    assert found.bits_per_byte == pytest.approx(-found.summed / 18 / math.log(2))


def test_bits_per_byte_of_equal_bytes():
    """A model that gives every byte 1/256 needs 8 bits, however many tokens they are."""
    assert subwords.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    with pytest.raises(ValueError, match="size is 0: choose"):
        subwords.bits_per_byte(1.0, 0)


@pytest.mark.parametrize("call", [lambda t: likelihood(t, TEXTS), lambda t: encode(t, TEXTS[0], 9)])
@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_likelihood_needs_a_unigram_model(tokenizers, algorithm, call):
    with pytest.raises(ValueError, match=r"tokenizer is a (BPE|WordPiece) model: pass one that train"):
        call(tokenizers[algorithm])


def test_likelihood_needs_texts(tokenizers):
    with pytest.raises(ValueError, match="texts are empty"):
        likelihood(tokenizers["unigram"], [""])


def test_a_text_within_a_budget(tokenizers):
    """Fewer tokens than the best path has: they still decode to the text, and are the likeliest so few."""
    tokenizer, text = tokenizers["unigram"], "the stations' rain, walked"
    free = tokenizer(text)["input_ids"]
    assert encode(tokenizer, text, len(free)) == encode(tokenizer, text, 999) == free
    with pytest.raises(ValueError, match=r"most is 1, but .* takes \d+ pieces: choose at least that many"):
        encode(tokenizer, text, 1)
    scores = scores_of(tokenizer)
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    cheapest = [best_by_length(costs_of(scores, word)) for word in words]
    combined = {0: 0.0}
    for word in cheapest:
        sums = [(m + n, c + d) for m, c in combined.items() for n, d in word.items()]
        combined = {n: min(cost for k, cost in sums if k == n) for n, _ in sums}
    for most in range(min(combined), len(free)):
        ids = encode(tokenizer, text, most)
        assert len(ids) <= most
        assert tokenizer.decode(ids) == text
        cost = -sum(scores[token] for token in tokenizer.convert_ids_to_tokens(ids))
        assert cost == pytest.approx(min(cost for n, cost in combined.items() if n <= most))
    assert encode(tokenizer, "", 0) == []


def scores_of(tokenizer):
    """Of all tokens but the special one, which is first."""
    return dict(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"][1:])


def best_by_length(costs):
    """Number of pieces -> the least cost."""
    return {n: min(cost for cut, cost in costs.items() if len(cut) == n) for n in {len(cut) for cut in costs}}


def test_the_example_judges_every_vocabulary(tmp_path, monkeypatch):
    """Every held-out token is predicted once, and nothing is run twice."""
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    example = runpy.run_path(str(examples / "subwords.py"))
    names, trained, models = example["main"].__globals__, example["trained"], []
    for name, value in (
        ("SIZES", (262, 266)),
        ("CONTEXT", 16),
        ("SIZE", example["SIZE"] | {"num_hidden_layers": 1, "hidden_size": 8}),
    ):
        monkeypatch.setitem(names, name, value)
    monkeypatch.setitem(names, "trained", lambda *run: models.append((run[0], *trained(*run))) or models[-1][1:])
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(TEXTS[i % 3][i:] + " é")
    options = {"text": str(tmp_path / "text"), "read": 900, "seeds": 1, "output": tmp_path / "out"}
    found = example["main"](**options)
    assert [*found] == [262, 266] and all([*found[size]] == [*example["ARMS"], "bytes"] for size in found)
    assert len(models) == 7  # bytes are run once
    tokenizer, model, _ = models[0]
    held = example["data"].load_text(options["text"]).train_test_split(test_size=0.05, seed=0)["test"]["text"]
    ids = [tokenizer.eos_token_id]
    for text in held:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    nats, model = 0.0, unpatch(model)
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[start : start + 17]])
        logits = model(input_ids=window[:, :-1]).logits.log_softmax(-1)
        nats -= logits.gather(2, window[:, 1:, None]).sum().item()
    size, row = sum(len(text.encode()) for text in held), found[262]["bpe"][0]
    assert row["bits/byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert row["bytes/token"] == pytest.approx(size / (len(ids) - 1 - len(held)))
    assert found[262]["bytes"] == found[266]["bytes"] and found[262]["bytes"][0]["bytes/token"] == 1
    assert found[262]["unigram"][0]["all cuts"] < 8
    monkeypatch.setitem(names, "trained", None)
    assert example["main"](**options) == found
