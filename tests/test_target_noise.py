"""Noise of targets: how much of them changes, what does not, and which rows it reaches."""

from collections import Counter

import pytest
from datasets import Dataset

from hf_xent.data.target_noise import NOISES, TargetNoise

EVERY = pytest.mark.parametrize("kind", NOISES)
TEXT = " ".join(f"w{i}" for i in range(10))


def changed(kind, found, words):
    """How many words of a target without equal words were picked."""
    if kind == "shuffle":
        return sum(a != b for a, b in zip(found, words, strict=True))
    return abs(len(found) - len(words))


@EVERY
def test_nothing_is_the_identity_and_all_is_all(kind):
    """Without a share the target itself comes back; with all of it, every word is picked."""
    odd = "two  spaces\tand a tab"
    assert TargetNoise(kind, 0.0).of(odd, 0) is odd
    assert TargetNoise(kind, 0.0).of([5, 6, -100], 0) == [5, 6, -100]
    assert TargetNoise(kind, 1.0).of("", 3) == "" and TargetNoise(kind, 1.0).of([], 3) == []
    found, words = TargetNoise(kind, 1.0).of(TEXT, 0).split(), TEXT.split()
    if kind == "shuffle":
        assert Counter(found) == Counter(words) and all(a != b for a, b in zip(found, words, strict=True))
    elif kind == "repeat":
        assert found == [word for word in words for _ in range(2)]
    elif kind == "blank":
        assert len(found) == 1 and found[0] in words, "one word is left"
    else:
        assert found != words


@pytest.mark.parametrize("kind", ["shuffle", "repeat", "blank"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("length", [3, 10])
def test_the_share_of_words_is_exact_in_the_mean(kind, share, length):
    """At most one word more or less in each row, and the mean within five standard errors of a uniform draw."""
    words, rows = [f"w{i}" for i in range(length)], 2000
    noise = TargetNoise(kind, share)
    counts = [changed(kind, noise.of(" ".join(words), row).split(), words) for row in range(rows)]
    assert all(abs(count - share * length) <= (2 if kind == "shuffle" else 1) for count in counts)
    assert sum(counts) / rows == pytest.approx(share * length, abs=5 * (1 if kind == "shuffle" else 0.5) / rows**0.5)


def test_every_word_is_picked_alike():
    """Places of dropped words over many rows."""
    noise = TargetNoise("blank", 0.3, blank="_")
    places = Counter(i for row in range(3000) for i, word in enumerate(noise.of(TEXT, row).split()) if word == "_")
    assert sum(places.values()) == 9000 and all(abs(places[i] - 900) < 5 * (3000 * 0.21) ** 0.5 for i in range(10))


def test_combined_is_each_alike():
    """Repeated words make a target longer, blanked ones are named, shuffled ones are what is left."""
    noise, total = TargetNoise("combined", 0.5, blank="_"), Counter()
    for row in range(1000):
        found = noise.of(TEXT, row).split()
        blanks, twice = found.count("_"), len(found) - 10
        once = [word for i, word in enumerate(found) if word != "_" and (i == 0 or found[i - 1] != word)]
        assert len(once) + blanks == 10 and blanks + twice <= 5 and 5 - blanks - twice != 1
        total += Counter(blanks=blanks, twice=twice, moved=5 - blanks - twice)
    alone = 5 * (1 / 3) * (2 / 3) ** 4  # the probability that one word alone would be shuffled, which is then not
    expected = {"moved": 5 / 3 - alone, "blanks": 5 / 3 + alone / 2, "twice": 5 / 3 + alone / 2}
    assert {name: count / 1000 for name, count in total.items()} == pytest.approx(expected, abs=0.2)


def test_words_stay_within_their_block():
    """Blocks of three words, the last one of four."""
    noise = TargetNoise("shuffle", 0.6, window=3)
    moved = 0
    for row in range(200):
        found = [int(word[1:]) for word in noise.of(TEXT, row).split()]
        assert [sorted(found[a:b]) for a, b in ((0, 3), (3, 6), (6, 10))] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
        moved += sum(a != b for a, b in enumerate(found))
    assert moved / 2000 == pytest.approx(0.6, abs=0.05)
    assert TargetNoise("shuffle", 1.0, window=3).of("a b c d e", 0).split()[0] in "bcde", "too short for two blocks"


@EVERY
def test_ids_keep_what_is_no_word(kind):
    """The end stays last, ignored labels first; the row and the seed alone decide, not the process."""
    noise = TargetNoise(kind, 0.5, kept=[2])
    found = noise.of([-100, -100, 11, 12, 13, 14, 15, 16, 2], 7)
    assert found[:2] == [-100, -100] and found[-1] == 2 and 2 not in found[:-1] and found != noise.of(found, 8)
    assert found == TargetNoise(kind, 0.5, kept=(2,)).of([-100, -100, 11, 12, 13, 14, 15, 16, 2], 7)
    others = {tuple(TargetNoise(kind, 0.5, seed=seed).of([11, 12, 13, 14, 15, 16], 7)) for seed in range(5)}
    assert len(others) > 1


def test_golden_targets():
    """The same on every machine and in every version: published runs depend on it."""
    found = {kind: TargetNoise(kind, 0.5, seed=1).of("a b c d e f", 4) for kind in NOISES}
    assert found == {
        "shuffle": "f a c d e b",
        "repeat": "a a b b c d e f f",
        "blank": "c d e",
        "combined": "a a b b c d e",
    }


def test_maps_over_data_sets(tmp_path):
    """Text, ids, and the assistant's turns of conversations; other columns and roles stay; processes do not matter."""
    turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    rows = Dataset.from_list([{"source": TEXT, "labels": [*range(3, 9)], "fr": TEXT, "messages": turns}] * 6)
    one = rows.map(TargetNoise("repeat", 0.5, column="fr"), with_indices=True)
    assert one["source"] == rows["source"] and one["labels"] == rows["labels"]
    assert all(len(text.split()) == 15 for text in one["fr"]) and len({*one["fr"]}) > 1
    chat = rows.map(TargetNoise("blank", 0.5, column="messages"), with_indices=True)
    for first, second in chat["messages"]:
        assert first == turns[0] and second["role"] == "assistant" and len(second["content"].split()) == 5
    ids = rows.map(TargetNoise("shuffle", 1.0), with_indices=True)
    assert all(sorted(row) == [*range(3, 9)] and row != [*range(3, 9)] for row in ids["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "swap"}, "kind is 'swap': choose one of shuffle, repeat"),
        ({"share": 1.5}, r"share is 1\.5: choose a number in \[0, 1\]"),
        ({"seed": -1}, "seed is -1: choose a whole number"),
        ({"window": 1}, "window is 1: choose a whole number of at least 2"),
        ({"kind": "repeat", "window": 3}, "window is 3, but kind is 'repeat', which"),
        ({"blank": "_"}, "blank is '_', but kind is 'shuffle', which"),
        ({"column": 3}, "column is 3"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TargetNoise(**{"kind": "shuffle", "share": 0.5} | options)


@pytest.mark.parametrize("target", [3, None, [1.5], {"a": 1}, ["word"]], ids=str)
def test_other_targets_are_refused(target):
    with pytest.raises(ValueError, match="give text, a list of token ids, or a list of messages"):
        TargetNoise("shuffle", 0.5).of(target, 0)
    with pytest.raises(ValueError, match="column is 'labels', but a row has text: name the column"):
        TargetNoise("shuffle", 0.5)({"text": TEXT}, 0)
