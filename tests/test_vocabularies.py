"""What tokens stand for, which two tokenizers share, and one text in both: real tokenizers, trained on the spot."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from hf_xent.models.alignment import groups
from hf_xent.models.translation import Translation
from hf_xent.models.vocabularies import same_vocabulary, shared_tokens, vocabulary_of
from support.vocabularies import byte_level, sentencepiece, trl_uld

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    " naïve café über, 東京 and 🦊🦊 emoji\n\tdef f(x):  return x",
    "  unbelievable  spaces ",
    "a",
    "",
)


@pytest.fixture(scope="module")
def tokenizers():
    """Three that split alike nowhere: byte-level of two sizes, the second one with a space before text, and pieces."""
    return {
        "bytes": byte_level(290, eos="<|end|>", pad="<|pad|>", extra=["<|user|>"]),
        "more bytes": byte_level(360, bos="<s>", eos="</s>", prefix=True, extra=["<|user|>"]),
        "pieces": sentencepiece(bos="<bos>", eos="<eos>"),
    }


def test_tokens_that_stand_for_the_same_are_shared(tokenizers):
    for student in tokenizers.values():
        for teacher in tokenizers.values():
            ours, theirs = shared_tokens(student, teacher)
            assert len(ours.unique()) == len(theirs.unique()) == len(ours) > 30
            one, two = vocabulary_of(student), vocabulary_of(teacher)
            pairs = list(zip(ours.tolist(), theirs.tolist(), strict=True))
            if student is teacher:
                assert pairs == [(i, i) for i in range(len(student))]
                continue
            ordinary = [(i, j) for i, j in pairs if i in one.ordinary]
            assert all(one.ordinary[i] == two.ordinary[j] for i, j in ordinary)
            assert {one.ordinary[i] for i, _ in ordinary} == {*one.ordinary.values()} & {*two.ordinary.values()}
            special = {(one.special[i], two.special[j]) for i, j in pairs if i in one.special}
            assert (student.eos_token, teacher.eos_token) in special
            assert (("<|user|>", "<|user|>") in special) == (
                "<|user|>" in student.get_vocab().keys() & teacher.get_vocab()
            )
    ours, theirs = shared_tokens(tokenizers["bytes"], tokenizers["pieces"])
    pairs = dict(zip(ours.tolist(), theirs.tolist(), strict=True))
    spelled = tokenizers["bytes"].convert_tokens_to_ids("Ġthe")
    assert tokenizers["pieces"].convert_ids_to_tokens(pairs[spelled]) == "\u2581the"
    letter = pairs[tokenizers["bytes"].convert_tokens_to_ids("e")]
    assert tokenizers["pieces"].convert_ids_to_tokens(letter) == "e", "not <0x65>, the same byte that is never made"
    assert not same_vocabulary(tokenizers["bytes"], tokenizers["pieces"])


def test_tokens_that_do_not_spell_the_text_are_refused():
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="do not spell the text: pass one that is byte-level or sentencepiece"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]"))
    one, two = (byte_level(260, text=text, eos=None, alphabet=False) for text in ("abab", "cdcd"))
    with pytest.raises(ValueError, match="share no token"):
        shared_tokens(one, two)


def test_groups_end_where_both_end_a_token():
    assert groups([2, 6, 4, 5], [4, 4, 4, 5]) == [([0, 1], [0, 1]), ([2], [2]), ([3], [3])]
    assert groups([0, 3, 0, 2], [5]) == [([1, 3], [0])], "tokens of no bytes belong to none"
    assert groups([1, 2], [0, 1, 1]) == [([0], [1])], "nor does what only one side has read to its end"
    assert groups([], [1]) == groups([3], [2, 2]) == []


def test_groups_equal_those_of_trl():
    align, draw = trl_uld()._align_by_byte_offsets, random.Random(0)
    for _ in range(200):
        total = draw.randint(1, 30)
        cuts = [sorted(draw.sample(range(1, total), draw.randint(0, total - 1))) for _ in range(2)]
        sides = [list(zip([0, *cut], [*cut, total], strict=True)) for cut in cuts]
        expected = list(zip(*align(*sides), strict=True))
        assert groups(*([end - start for start, end in side] for side in sides)) == expected


def spelled(tokenizer, ids):
    """The bytes that ids stand for, by the tokenizer's own decoder."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()


@pytest.mark.parametrize("teacher", ["bytes", "more bytes", "pieces"])
@pytest.mark.parametrize("student", ["bytes", "more bytes", "pieces"])
def test_a_translation_is_the_same_text_byte_for_byte(tokenizers, student, teacher):
    student, teacher = tokenizers[student], tokenizers[teacher]
    rows = [student(text)["input_ids"] for text in TEXTS]
    for text, ids, found in zip(TEXTS, rows, Translation(student, teacher)(rows), strict=True):
        # of the tokens of a student that puts a space before text, one space is taken as that
        text = text.removeprefix(" ") if student.bos_token is not None else text
        expected = teacher(text)["input_ids"]
        assert found.teacher_ids == expected
        started = [0] * (teacher.bos_token is not None)  # which its tokenizer puts there
        assert found.teacher_lengths[: len(started)] == started
        size = len(text.encode())
        assert sum(found.student_lengths) == sum(found.teacher_lengths) == size
        together = groups(found.student_lengths, found.teacher_lengths)
        assert [k for ours, _ in together for k in ours] == [k for k, x in enumerate(found.student_lengths) if x]
        for ours, theirs in together:  # each side's own decoder agrees, except about spaces before text
            one, two = spelled(student, [ids[k] for k in ours]), spelled(teacher, [expected[k] for k in theirs])
            assert one.strip() == two.strip()


def test_special_tokens_are_matched_written_out_or_left_out(tokenizers):
    student, teacher = tokenizers["bytes"], tokenizers["pieces"]
    ids = student("the fox<|end|>dog<|user|>a<|pad|>")["input_ids"]
    (found,) = Translation(student, teacher)([ids])
    assert teacher.convert_ids_to_tokens(found.teacher_ids)[0] == "<bos>"
    assert found.teacher_ids == teacher("the fox<eos>dog<|user|>a")["input_ids"]
    lengths = dict(zip(student.convert_ids_to_tokens(ids), found.student_lengths, strict=True))
    assert (lengths["<|end|>"], lengths["<|user|>"], lengths["<|pad|>"]) == (1, len("<|user|>"), 0)
    assert sum(found.student_lengths) == sum(found.teacher_lengths)
    back = tokenizers["more bytes"]
    (found,) = Translation(teacher, back)([teacher("the fox<eos>")["input_ids"]])
    assert back.convert_ids_to_tokens(found.teacher_ids[:1] + found.teacher_ids[-1:]) == ["<s>", "</s>"]
    assert found.student_lengths[0] == found.teacher_lengths[0] == 0, "each has a bos of its own"


def test_a_marker_of_chats_that_is_called_bos_stays():
    student, teacher = (byte_level(300, eos="<|end|>", extra=["<|user|>"]) for _ in range(2))
    student.bos_token = "<|user|>"
    ids = student("<|user|>the fox<|end|>")["input_ids"]
    for started in (None, "<|user|>"):
        teacher.bos_token = started
        (found,) = Translation(student, teacher)([ids])
        assert found.teacher_ids == ids and found.student_lengths == found.teacher_lengths
        assert found.student_lengths[0] == 1


def test_sampled_tokens_and_cut_characters_have_exact_offsets(tokenizers):
    student, teacher = tokenizers["bytes"], tokenizers["more bytes"]
    letters = [student.convert_tokens_to_ids(letter) for letter in "theĠfox"]  # as no tokenizer would split it
    fox = student("🦊", add_special_tokens=False)["input_ids"]
    assert len(fox) == 4
    whole, cut, inside, unknown = Translation(student, teacher)(
        [letters, [*letters, *fox[:2]], [*letters, *fox[:2], *letters], [len(student) + 5]]
    )
    assert whole.student_lengths == [1] * 7
    assert cut.student_lengths == [1] * 9 and cut.teacher_ids == whole.teacher_ids
    assert inside is None and unknown is None


def test_a_text_that_the_teacher_cannot_spell_has_no_translation(tokenizers):
    lower = byte_level(300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = Translation(tokenizers["bytes"], lower)(
        [tokenizers["bytes"](x)["input_ids"] for x in ("the Fox", "the fox")]
    )
    assert found[0] is None and found[1] is not None
    unknown = sentencepiece(bos="<bos>", eos="<eos>", fallback=False)
    rows = [tokenizers["bytes"](x)["input_ids"] for x in ("the 東", "the fox")]
    found = Translation(tokenizers["bytes"], unknown)(rows)
    assert found[0] is None and found[1] is not None
