"""Extractive questions: windows against a loop over tokens, answers against all spans, pairs of languages, measures."""

from collections import Counter
from itertools import product

import datasets
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import EvalPrediction

from hf_xent.data.crosslingual import CrossLingual, all_pairs, by_language
from hf_xent.data.questions import answers_of, windows
from hf_xent.metrics.answers import exact_match, f1, map_at_k, normalized
from hf_xent.trainers import AnswerMetrics
from support.models import tiny_tokenizer

CONTEXT = "the quick brown fox jumps over the lazy dog "


def tokenizer_of(side="right", template=True):
    tokenizer = tiny_tokenizer(CONTEXT * 8)
    if template:  # as BERT's: [CLS] question [SEP] context [SEP]
        special = [("<s>", 1), ("</s>", 2)]
        processor = TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.padding_side = side
    return tokenizer


def table(*rows):
    """Rows of (id, question, context, answer); the answer is None, or where it first is."""
    return datasets.Dataset.from_list([
        {"id": name, "question": question, "context": context,
         "answers": {"text": [x] if x else [], "answer_start": [context.index(x)] if x else []}}
        for name, question, context, x in rows
    ])  # fmt: skip


ROWS = table(
    ("long", "who jumps", CONTEXT * 3, "fox"),
    ("last", "what is lazy", CONTEXT + "and the end", "end"),
    ("part", "over what", CONTEXT, "ump"),  # in the middle of a word
    ("none", "who sleeps", CONTEXT, None),
)


@pytest.mark.parametrize(("side", "stride"), [("right", 5), ("right", 0), ("left", 5)])
def test_windows_are_those_of_a_loop(side, stride):
    """Every token by hand: where a window begins, what it has, and where the answer is in it."""
    tokenizer, size = tokenizer_of(side), 30
    found = iter(windows(ROWS, tokenizer, max_length=size, stride=stride))
    for row in ROWS:
        parts = [tokenizer(row[name], add_special_tokens=False, return_offsets_mapping=True)
                 for name in ("question", "context")]  # fmt: skip
        (question, context), places = [part["input_ids"] for part in parts], parts[1]["offset_mapping"]
        room, first = size - len(question) - 3, 0
        while True:
            window, piece = next(found), context[first : first + room]
            before = 1 if side == "left" else len(question) + 2
            expected = [1, *piece, 2, *question, 2] if side == "left" else [1, *question, 2, *piece, 2]
            assert window["input_ids"] == expected and window["id"] == row["id"]
            offsets = [list(pair) for pair in places[first : first + room]]
            assert window["offsets"] == [[0, 0]] * before + offsets + [[0, 0]] * (len(expected) - before - len(piece))
            span = (window["start_positions"], window["end_positions"])
            text, start = ([*row["answers"][name], None][0] for name in ("text", "answer_start"))
            inside = text is not None and offsets[0][0] <= start and start + len(text) <= offsets[-1][1]
            if inside:
                covered = [i for i, (a, b) in enumerate(offsets) if b > start and a < start + len(text)]
                assert span == (before + covered[0], before + covered[-1])
            else:
                assert span == (0, 0)
            if first + room >= len(context):
                break
            first += room - stride
    assert next(found, None) is None


def test_windows_find_an_answer_s_characters():
    found = windows(ROWS, tokenizer_of(), max_length=30, stride=12)
    contexts = dict(zip(ROWS["id"], ROWS["context"], strict=True))
    spans = [(w["id"], contexts[w["id"]][w["offsets"][w["start_positions"]][0] : w["offsets"][w["end_positions"]][1]])
             for w in found if w["start_positions"]]  # fmt: skip
    assert {name for name, _ in spans} == {"long", "last", "part"}
    texts = {"long": "fox", "last": "end", "part": "ump"}
    assert all(texts[name] in text and len(text.split()) == 1 for name, text in spans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": object()}, "tokenizer is a object, which has no offsets: pass a fast tokenizer"),
        ({"max_length": 12}, "row 'long': its question leaves .* of max_length 12 tokens to the context, but .*"),
        ({"stride": -1}, "stride is -1: choose a whole number of at least 0"),
        ({"rows": ROWS.remove_columns("answers")}, "rows have no column answers, but id, question, context: rename .*"),
    ],
)
def test_windows_refuse(change, message):
    arguments = {"rows": ROWS, "tokenizer": tokenizer_of(), "max_length": 30, "stride": 5} | change
    with pytest.raises(ValueError, match=rf"^{message}$"):
        windows(**arguments)


def test_an_answer_that_is_elsewhere_is_refused():
    row = {"id": "x", "question": "who", "context": CONTEXT, "answers": {"text": ["fox"], "answer_start": [3]}}
    with pytest.raises(ValueError, match=r"^row 'x': its answer is 'fox', but its context has ' qu' at answer_start 3"):
        windows(datasets.Dataset.from_list([row]), tokenizer_of())


def test_without_special_tokens_no_answer_is_the_first_token():
    found = windows(ROWS.select([3]), tokenizer_of(template=False), max_length=60, stride=5)
    assert found[0]["start_positions"] == found[0]["end_positions"] == 0 and len(found) == 1


@pytest.mark.parametrize("no_answer", [False, True])
def test_answers_are_the_best_of_all_spans(no_answer):
    features, draw, longest = windows(ROWS, tokenizer_of(), max_length=30, stride=5), np.random.default_rng(0), 4
    width = max(map(len, features["input_ids"])) + 2  # padding, whose logits are not read
    start, end = draw.normal(0, 1, (2, len(features), width))
    start[:, -2:], end[:, -2:] = 100, 100
    found = answers_of(ROWS, features, (start, end), n_best=3, max_answer_tokens=longest, no_answer=no_answer)
    for row in ROWS:
        spans, empty = {}, np.inf
        for number, window in enumerate(features):
            if window["id"] != row["id"]:
                continue
            empty = min(empty, start[number, 0] + end[number, 0])
            context = [i for i, (a, b) in enumerate(window["offsets"]) if b > a]
            for i, j in product(context, context):
                if i <= j < i + longest:
                    first, last = window["offsets"][i][0], window["offsets"][j][1]
                    first += row["context"][first] == " "  # a token of this tokenizer may begin or be a space
                    last -= row["context"][last - 1] == " "
                    score = start[number, i] + end[number, j]
                    spans[first, last] = max(spans.get((first, last), -np.inf), score)
        if no_answer:
            spans[0, 0] = empty
        expected = sorted(spans.items(), key=lambda item: -item[1])[:3]
        texts = [(row["context"][first:last], first) for (first, last), _ in expected]
        assert [(answer.text, answer.start) for answer in found[row["id"]]] == texts
        assert [answer.score for answer in found[row["id"]]] == pytest.approx([score for _, score in expected])


def test_answers_refuse_other_windows():
    features = windows(ROWS, tokenizer_of(), max_length=30, stride=5)
    with pytest.raises(ValueError, match=r"^logits are of 2 and 2 windows, but features has \d+$"):
        answers_of(ROWS, features, (np.zeros((2, 30)), np.zeros((2, 30))))


@pytest.mark.parametrize("joined", [True, False])
def test_metrics_of_perfect_and_of_wrong_logits(joined):
    """Perfect logits have a 1 everywhere, but for the answer in the middle of a word; batches of other lengths too."""
    features = windows(ROWS, tokenizer_of(), max_length=40, stride=20)
    logits = [np.zeros((len(features), 40), dtype=np.float32) for _ in range(2)]
    for part, name in zip(logits, ("start_positions", "end_positions"), strict=True):
        part[np.arange(len(features)), features[name]] = 9
    metrics = AnswerMetrics(ROWS, features, no_answer=True)
    parts = logits if joined else [[part[:2, :39], part[2:]] for part in logits]
    found = metrics(EvalPrediction(tuple(parts), None))
    assert found["map_at_k"] == 1 and found["exact_match"] >= 0.5 and found["f1"] >= found["exact_match"]
    wrong = metrics(EvalPrediction(tuple(-part for part in logits), None)) if joined else {"exact_match": 0}
    assert wrong["exact_match"] < found["exact_match"]


def test_measures_are_squad_s():
    assert normalized(" The  Cat's, a  hat! ") == "cats hat"
    assert exact_match("the Fox.", ["dog", "fox"]) == 1 and exact_match("foxes", ["fox"]) == 0
    assert f1("quick brown fox", ["brown fox jumps over", "dog"]) == pytest.approx(2 * 2 / 7)
    assert f1("fox fox", ["fox"]) == pytest.approx(2 / 3)
    assert exact_match("", []) == f1("", []) == 1 and f1("fox", []) == f1("", ["fox"]) == 0
    assert map_at_k(torch.tensor([[0.0, 1, 2]]), torch.tensor([20])) == 0


def languages(count=6):
    """The context of a language has a word of its own, so that a row says which one it is."""
    words = {"en": "quick", "fr": "brown", "es": "lazy"}
    return {name: table(*((str(i), f"{word} {i}", CONTEXT, word) for i in range(count)))
            for name, word in words.items()}  # fmt: skip


@pytest.mark.parametrize("same", [False, True])
def test_pairs_of_languages_are_uniform_and_of_two(same):
    """A chi-squared test at 1e-4; the same again by seed and epoch, in any order, and another draw in the next one."""
    data = CrossLingual(languages(300), tokenizer_of(), seed=3, same_language=same)
    drawn = []
    for epoch in range(10):
        data.set_epoch(epoch)
        drawn.append([data.pair(i) for i in range(len(data))])
    counts, cells = Counter(pair for part in drawn for pair in part), 9 if same else 6
    assert len(counts) == cells and any(a == b for a, b in counts) == same
    expected = 3000 / cells
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < (31.8 if same else 25.7)
    data.set_epoch(4)
    assert [data.pair(i) for i in reversed(range(300))] == drawn[4][::-1] != drawn[5][::-1]
    again = CrossLingual(languages(300), tokenizer_of(), seed=4, same_language=same)
    again.set_epoch(4)
    assert [again.pair(i) for i in range(300)] != drawn[4]


def test_a_row_has_the_question_of_one_and_the_answer_of_the_other_language():
    data, tokenizer = CrossLingual(languages(), tokenizer_of(), max_length=40, stride=5), tokenizer_of()
    words = {"en": "quick", "fr": "brown", "es": "lazy"}
    for i in range(len(data)):
        row, (asked, read) = data[i], data.pair(i)
        assert set(row) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
        assert tokenizer.decode(row["input_ids"]).replace("<s>", "").strip().startswith(words[asked])
        answer = tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
        assert answer.strip() == words[read] and asked != read


def test_workers_that_live_on_see_the_epoch():
    data = CrossLingual(languages(), tokenizer_of(), max_length=40, stride=5)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, persistent_workers=True, collate_fn=lambda row: row["input_ids"]
    )
    found = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        found.append(list(loader))
    data.set_epoch(1)
    assert found[0] == found[2] != found[1] == [data[i]["input_ids"] for i in range(6)]


def test_all_pairs_and_columns_by_language():
    aligned = languages(2)
    merged = {"id": aligned["en"]["id"]}
    for name, rows in aligned.items():
        merged |= {f"{column}_{name}": rows[column] for column in ("question", "context", "answers")}
    split = by_language(datasets.Dataset.from_dict(merged), ["en", "fr"])
    assert [split["fr"][1][name] for name in aligned["fr"].column_names] == [*aligned["fr"][1].values()]
    found = all_pairs(split)
    assert found["id"] == ["0_en-fr", "1_en-fr", "0_fr-en", "1_fr-en"]
    assert found[0]["question"] == "quick 0" and found[0]["answers"]["text"] == ["brown"]
    assert len(all_pairs(aligned, same_language=True)) == 18
    with pytest.raises(ValueError, match=r"^rows have no column question_de, context_de, answers_de, but id, "):
        by_language(datasets.Dataset.from_dict(merged), ["de"])
    with pytest.raises(ValueError, match=r"^languages has en: give the same rows in two or more$"):
        CrossLingual({"en": aligned["en"]}, tokenizer_of())
    with pytest.raises(ValueError, match=r"^rows of fr are not those of en: give the same id in the same order$"):
        all_pairs({"en": aligned["en"], "fr": aligned["fr"].select([0])})
