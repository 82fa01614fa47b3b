"""The tagger of words: features of words from tokens, what is cut, and RePRI on them."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertForTokenClassification, BertModel, PreTrainedTokenizerFast

from hf_xent.adapt import RePRI, TransductiveTagger, word_features

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "anna",
    "bert",
    "##ram",
    "sings",
    "and",
    "sleep",
    "##s",
    "on",
    "the",
    "sea",
]
SENTENCES = [["Anna", "sings"], ["Bertram", "and", "Anna", "sleeps"], ["sea"]]
SUPPORT, MARKS = [["Anna", "sleeps", "on", "the", "sea"], ["Bertram", "sings"]], [[1, 0, 0, 0, 0], [1, 0]]


@pytest.fixture(scope="module")
def tokenizer():
    """Lower case, with two words of two pieces, and [CLS] and [SEP] around a sentence."""
    found = Tokenizer(WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=32)  # fmt: skip
    return BertModel(config).eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_word_is_its_tokens(encoder, tokenizer, pooling):
    """Bertram is tokens 1 and 2 of its sentence, behind [CLS]; sleeps are the last two."""
    found = word_features(encoder, tokenizer, SENTENCES, pooling=pooling, batch_size=2)
    assert [len(rows) for rows in found] == [2, 4, 1]
    ids = torch.tensor([[2, 5, 6, 8, 4, 9, 10, 3]])
    states = encoder(input_ids=ids).last_hidden_state[0].detach()
    take = (lambda *places: states[list(places)].mean(0)) if pooling == "mean" else (lambda first, *_: states[first])
    close(found[1], torch.stack([take(1, 2), take(3), take(4), take(5, 6)]))
    alone = word_features(encoder, tokenizer, SENTENCES[:1], pooling=pooling)
    close(found[0], alone[0])


def test_a_classifier_gives_the_states_of_its_encoder(encoder, tokenizer):
    model = BertForTokenClassification(encoder.config).train()
    model.bert.load_state_dict({k: v for k, v in encoder.state_dict().items() if "pooler" not in k})
    found = word_features(model, tokenizer, SENTENCES)
    assert model.training
    for ours, theirs in zip(found, word_features(encoder, tokenizer, SENTENCES), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_words_that_are_cut_or_empty_are_nan(encoder, tokenizer, pooling):
    """Six tokens are [CLS], four pieces and [SEP]; a word that is cut in its middle is not read."""
    rows = [["Bertram", "and", "Bertram", "sings"], ["", "Anna"]]
    found = word_features(encoder, tokenizer, rows, pooling=pooling, max_length=6)
    assert [part.isnan().any(1).tolist() for part in found] == [[False, False, True, True], [True, False]]


def test_tags_are_those_of_repri(encoder, tokenizer):
    tagger = TransductiveTagger(encoder, tokenizer)
    found = tagger.tag(SUPPORT, MARKS, SENTENCES)
    assert [len(p) for p in found] == [2, 4, 1]
    support, query = (torch.cat(word_features(encoder, tokenizer, rows)) for rows in (SUPPORT, SENTENCES))
    p = RePRI().fit_predict(support, torch.tensor([1, 0, 0, 0, 0, 1, 0]), query, shots=2)
    close(torch.cat(found), p)
    other = RePRI(kl=0, entropy=0)
    close(
        torch.cat(TransductiveTagger(encoder, tokenizer, other).tag(SUPPORT, MARKS, SENTENCES, prior=0.5)),
        other.fit_predict(support, torch.tensor([1, 0, 0, 0, 0, 1, 0]), query),
    )


def test_words_that_were_marked_are_found(tokenizer):
    """An encoder whose states are one-hot vectors of tokens: names are found in other places, and nothing else."""
    config = BertConfig(vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=0, num_attention_heads=2)
    model = BertModel(config)
    for table in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
        table.weight.data.zero_()
    model.embeddings.word_embeddings.weight.data = torch.eye(len(PIECES), 16)
    found = TransductiveTagger(model, tokenizer).tag(SUPPORT, MARKS, SENTENCES, prior=3 / 7)
    assert [(p > 0.5).tolist() for p in found] == [[True, False], [True, False, True, False], [False]]


def test_several_tags_are_several_taggers(encoder, tokenizer):
    tagger = TransductiveTagger(encoder, tokenizer, max_length=7)
    marks = {"name": MARKS, "verb": [[0, 1, 0, 0, 0], [-100, 1]]}
    shares = {"verb": 0.3, "name": 0.4}
    for prior in (None, shares):
        found = tagger.tag(SUPPORT, marks, SENTENCES, prior=prior)
        assert list(found) == ["name", "verb"]
        for name, rows in marks.items():
            alone = tagger.tag(SUPPORT, rows, SENTENCES, prior=prior and prior[name])
            for ours, theirs in zip(found[name], alone, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.cat(found["name"]).isnan().tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"marks": MARKS[:1]}, r"marks have the lengths \[5\] and the sentences \[5, 2\]"),
        ({"marks": {"verb": [[0] * 5, [0] * 2]}}, "marks of 'verb' have no word that is read"),
        ({"marks": [[0] * 5, [0] * 2]}, "marks have no word that is read"),
        ({"marks": {}}, "marks have 0 tags"),
        ({"query": []}, "query has 0 sentences"),
        ({"query": [[""]]}, "query has no word with a token"),
        ({"marks": {"name": MARKS}, "prior": {"verb": 0.5}}, "prior is of .'verb'., but the tags are .'name'."),
        ({"marks": [[2, 0, 0, 0, 0], [1, 0]]}, "support_labels hold 2"),
    ],
    ids=str,
)
def test_tasks_that_are_none_are_refused(encoder, tokenizer, change, message):
    given = {"support": SUPPORT, "marks": MARKS, "query": SENTENCES, **change}
    with pytest.raises(ValueError, match=message):
        TransductiveTagger(encoder, tokenizer).tag(**given)


def test_options_that_are_none_are_refused(encoder, tokenizer):
    with pytest.raises(ValueError, match="pooling is 'max': choose from mean, first"):
        TransductiveTagger(encoder, tokenizer, pooling="max")
    with pytest.raises(ValueError, match="batch_size is 0"):
        TransductiveTagger(encoder, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="tokenizer is a object, which does not know words"):
        TransductiveTagger(encoder, object())


def test_states_that_are_not_finite_are_no_words_that_were_cut(encoder, tokenizer):
    broken = copy.deepcopy(encoder)
    broken.embeddings.word_embeddings.weight.data[4] = torch.nan
    with pytest.raises(ValueError, match="encoder gives hidden states that are not finite"):
        word_features(broken, tokenizer, SENTENCES)
