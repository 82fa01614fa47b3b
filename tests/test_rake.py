"""RAKE against a table worked by hand; texts without their key phrases."""

import pytest

from hf_xent.data.rake import phrases, without

STOP = {
    "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "in", "is", "it",
    "its", "of", "on", "or", "that", "the", "to", "was", "were", "will", "with",
}  # fmt: skip
TEXT = "The movie has a strong lead actor and a weak plot. The lead actor is great, and the plot is thin."


def test_golden_table():
    expected = {"strong lead actor": 8.0, "lead actor": 5.0, "weak plot": 3.5, "plot": 1.5}
    expected |= {"movie": 1.0, "great": 1.0, "thin": 1.0}
    assert phrases(TEXT, STOP) == expected
    assert list(phrases(TEXT, STOP)) == list(expected), "ties rank by first occurrence"


def test_breaks_repetitions_and_odd_words():
    assert phrases("fast car; fast car\nfast boat (fast) state-of-the-art", STOP) == {
        "state-of-the-art": 1 + 0, "fast car": 7 / 4 + 2, "fast boat": 7 / 4 + 2, "fast": 7 / 4,
    }  # fmt: skip
    assert phrases("very very good", STOP) == {"very very good": 3 + 3 + 3}
    assert phrases("The of and", STOP) == phrases("", STOP) == phrases("?! ...", STOP) == {}
    assert list(phrases("Don't panic: the Übermut of 42")) == ["don't panic", "übermut", "42"]


def test_graded_removal():
    intact, some, most, none = without(TEXT, (0, 2 / 7, 4 / 7, 1), STOP)
    assert intact == TEXT
    assert some == "The movie has a and a weak plot. The is great, and the plot is thin."
    assert most == "The movie has a and a. The is great, and the is thin."
    assert none == "The has a and a. The is, and the is."
    assert without("great", (0, 1), STOP) == ["great", ""] and without("", (0, 1), STOP) == ["", ""]
    assert without("a  b\nc", (0,), STOP) == ["a  b\nc"], "the text itself, doubled spaces and all"


def test_removal_is_monotone_and_leaves_no_doubled_spaces():
    shares = [i / 10 for i in range(11)]
    for shuffled in (False, True):
        texts = without(TEXT * 3, shares, shuffled=shuffled)
        counts = [len(text.split()) for text in texts]
        assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
        assert not any("  " in text for text in texts)


def test_the_control_removes_as_many_phrases_at_random():
    ranked, control = without(TEXT, (3 / 7,), STOP)[0], without(TEXT, (3 / 7,), STOP, shuffled=True)[0]
    assert control == without(TEXT, (3 / 7,), STOP, shuffled=True)[0] != ranked
    assert len(phrases(TEXT, STOP)) == 7


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_refusals(share):
    with pytest.raises(ValueError, match=rf"shares has {share}: choose numbers from 0 to 1"):
        without(TEXT, (share,))
