"""Answers of a language model to yes/no questions: against the softmax of plain forwards, resumed, and refused."""

import pytest
import torch

from hf_xent.data import Format
from hf_xent.generation import answering
from hf_xent.generation.aspects import aspects
from support.models import SETTINGS, V, tiny, tiny_tokenizer
from support.oracle import Largest

FORMAT = Format("{text} is {question} or", ("a", "b"))
TEXTS = ["the fox", "the lazy dog jumps over the quick brown fox", "brown", "the dog jumps"]
QUESTIONS = ["the dog", "a fox quick", "lazy"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("the quick brown fox jumps over the lazy dog or is a b " * 8)


@torch.no_grad()
def dense(model, tokenizer, format=FORMAT):
    """[n, Q] from the softmax over the whole vocabulary, one prompt at a time: no padding, no cache, no patch."""
    found = []
    for text in TEXTS:
        for question in QUESTIONS:
            prompt = format.template.format(text=text, question=question)
            yes, no = (tokenizer(f"{prompt} {answer}")["input_ids"][-1] for answer in "ab")
            p = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].double().softmax(-1)
            found.append(float(p[yes] / (p[yes] + p[no])))
    return torch.tensor(found).reshape(len(TEXTS), len(QUESTIONS))


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "bert bias", "opt", "mixtral aux loss", *SETTINGS])
def test_answers_are_those_of_full_logits(name, tokenizer):
    """Rows of four lengths, whose beginnings are shared by three questions; heads with scale, softcap and bias."""
    model = tiny(name, vocab_size=V)
    expected = dense(model, tokenizer)
    assert expected.std() > 1e-3
    torch.testing.assert_close(
        aspects(model, TEXTS, QUESTIONS, tokenizer=tokenizer, format=FORMAT), expected, rtol=1e-5, atol=1e-5
    )
    assert "_hf_xent" not in model.__dict__, "patched for the occasion"


def test_batches_order_padding_and_state_do_not_matter(tokenizer, monkeypatch):
    """Also with a question before the text, so that nothing is shared, and in a model that cannot continue."""
    model = tiny().train()
    ask = lambda rows=TEXTS, format=FORMAT, **options: aspects(  # noqa: E731
        model, rows, QUESTIONS, tokenizer=tokenizer, format=format, **options
    )
    expected = ask()
    for size in (1, 2, 5):
        torch.testing.assert_close(ask(batch_size=size), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ask(TEXTS[::-1]), expected.flip(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(ask({"text": text, "label": 1} for text in TEXTS), expected)
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    assert torch.equal(ask(), expected)
    monkeypatch.setattr(model, "_is_stateful", True, raising=False)
    torch.testing.assert_close(ask(), expected, rtol=0, atol=1e-6)
    first = Format("{question} is {text} or", ("a", "b"))
    torch.testing.assert_close(ask(format=first), dense(model.eval(), tokenizer, first), rtol=1e-5, atol=1e-5)
    assert ask([]).shape == (0, 3)


def test_the_text_runs_once_and_no_logits_are_made(tokenizer, monkeypatch):
    """Four rows at once: their beginnings, as long as the shortest one's, then twelve short continuations."""
    model, shapes = tiny(vocab_size=4099), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with Largest() as largest:
        aspects(model, TEXTS[1:2] * 4, QUESTIONS, tokenizer=tokenizer, format=FORMAT)
    words = len(tokenizer(f"{TEXTS[1]} is")["input_ids"])
    longest = max(len(tokenizer(f" {q} or")["input_ids"]) for q in QUESTIONS)
    assert shapes == [(4, words), (12, longest)] and largest.numel < 4 * 4099


def test_an_interrupted_call_goes_on(tokenizer, tmp_path, monkeypatch):
    """A batch is on disk when the next one fails; a torn line and another model's answers do not count."""
    model, file, batches = tiny(), tmp_path / "kept" / "answers.jsonl", []
    stock = answering._logits

    def counted(model, rows, *rest):
        batches.append(len(rows))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return stock(model, rows, *rest)

    monkeypatch.setattr(answering, "_logits", counted)
    options = {"tokenizer": tokenizer, "format": FORMAT, "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        aspects(model, TEXTS, QUESTIONS, **options, cache=file)
    file.write_text(file.read_text()[:-20])  # the last of six answers is torn
    found = aspects(model, TEXTS, QUESTIONS, **options, cache=file)
    assert sum(batches[3:]) == 12 - 5 and torch.equal(aspects(model, TEXTS, QUESTIONS, **options, cache=file), found)
    assert sum(batches[3:]) == 7, "nothing is asked twice"
    torch.testing.assert_close(found, dense(model, tokenizer), rtol=1e-5, atol=1e-5)
    more = aspects(model, TEXTS, [*QUESTIONS, "brown"], **options, cache=file)
    assert torch.equal(more[:, :3], found) and sum(batches[3:]) == 7 + 4
    other = tiny(tie_word_embeddings=True)
    torch.testing.assert_close(
        aspects(other, TEXTS, QUESTIONS, **options, cache=file), dense(other, tokenizer), rtol=1e-5, atol=1e-5
    )


def test_chat_templates(tokenizer, monkeypatch):
    """Yes follows the template's own end; the row's part is still shared."""
    model = tiny(std=0.5)
    plain = aspects(model, TEXTS, QUESTIONS, tokenizer=tokenizer, format=FORMAT)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    found = aspects(model, TEXTS, QUESTIONS, tokenizer=tokenizer, format=FORMAT)
    chat = Format("<s>{text} is {question} or</s>", ("a", "b"))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    torch.testing.assert_close(found, dense(model, tokenizer, chat), rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_refusals(tokenizer):
    def refused(message, rows=TEXTS, questions=QUESTIONS, model=None, **options):
        with pytest.raises(ValueError, match=message) as error:
            aspects(model or tiny(), rows, questions, tokenizer=tokenizer, **{"format": FORMAT, **options})
        assert "\n" not in str(error.value)

    refused("questions is 'lazy': pass a list", questions="lazy")
    refused(r"questions is \[\]: pass a list", questions=[])
    refused("write {question} where", format=Format("{text}", ("a", "b")))
    refused("choose two different ones that are always one token each", format=Format("{text} {question}", ("a", "a")))
    refused("a format has the field 'text', but items have name, question", rows=[{"name": "x"}])
    refused("batch_size is 0", batch_size=0)
    refused(r"a prompt has \d+ tokens, but the model has 64 positions", rows=["the quick " * 40], model=tiny("gpt2"))
    model = tiny()
    model.config.is_encoder_decoder = True
    refused("an encoder and a decoder: pass a causal LM", model=model)
