"""A model as several raters: against the softmax of plain forwards, binned, kept, and measured."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_xent import rasch
from hf_xent.data import Format
from hf_xent.generation import answering
from hf_xent.generation.labelers import Labels, label
from support.models import SETTINGS, V, tiny, tiny_tokenizer

FORMATS = {
    "letters": Format("{text} is {criterion} or", ("a", "b", "o")),
    "marks": Format("{text} over {criterion} jumps", ("d", "q", "x")),
    "turned": Format("{criterion} of {text}", ("o", "b", "a")),
}
CRITERIA = {"quick": "the quick fox", "lazy": "lazy"}
TEXTS = ["the fox", "the lazy dog jumps over the quick brown fox", "brown", "the dog jumps"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("the quick brown fox jumps over the lazy dog or is a b o q d x of " * 8)


@torch.no_grad()
def dense(model, tokenizer):
    """[n, C, F, K] from the softmax over the whole vocabulary, one prompt at a time."""
    found = []
    for text in TEXTS:
        for criterion in CRITERIA.values():
            for format in FORMATS.values():
                prompt = format.template.format(text=text, criterion=criterion)
                tokens = [tokenizer(f"{prompt} {answer}")["input_ids"][-1] for answer in format.answers]
                p = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].double().softmax(-1)[tokens]
                found.append((p / p.sum()).tolist())
    return torch.tensor(found).reshape(len(TEXTS), len(CRITERIA), len(FORMATS), 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", *SETTINGS])
def test_verdicts_are_those_of_full_logits(name, tokenizer):
    """Formats with verdicts of their own in one batch; only some begin with the text, so their beginnings are short."""
    model = tiny(name, vocab_size=V)
    expected = dense(model, tokenizer)
    found = label(model, TEXTS, CRITERIA, FORMATS, tokenizer=tokenizer, batch_size=5)
    assert expected.std() > 1e-3 and "_hf_xent" not in model.__dict__
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-5, atol=1e-5)
    first = {name: FORMATS[name] for name in ("letters", "marks")}  # now the text runs once
    shared = label(model, TEXTS, CRITERIA, first, tokenizer=tokenizer)
    torch.testing.assert_close(shared.probabilities, expected[:, :, :2], rtol=1e-5, atol=1e-5)


def test_an_interrupted_call_goes_on(tokenizer, tmp_path, monkeypatch):
    """A list of probabilities is a line of the file; a torn one does not count, nor do other verdicts of a prompt."""
    model, file, batches = tiny(), tmp_path / "kept" / "verdicts.jsonl", []
    stock = answering._logits

    def counted(model, rows, *rest):
        batches.append(len(rows))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return stock(model, rows, *rest)

    monkeypatch.setattr(answering, "_logits", counted)
    options = {"tokenizer": tokenizer, "batch_size": 4, "cache": file}
    with pytest.raises(KeyboardInterrupt):
        label(model, TEXTS, CRITERIA, FORMATS, **options)
    file.write_text(file.read_text()[:-2])  # the last of six lacks its end, though it has a bracket
    assert file.read_text().endswith("]")
    found = label(model, TEXTS, CRITERIA, FORMATS, **options)
    assert sum(batches[3:]) == 24 - 5
    torch.testing.assert_close(found.probabilities, dense(model, tokenizer), rtol=1e-5, atol=1e-5)
    again = label(model, TEXTS, CRITERIA, FORMATS, **options)
    assert torch.equal(again.probabilities, found.probabilities) and sum(batches[3:]) == 19
    turned = {"letters": Format(FORMATS["letters"].template, ("b", "a", "o"))}
    other = label(model, TEXTS, CRITERIA, turned, **options).probabilities[:, :, 0]
    torch.testing.assert_close(other, found.probabilities[:, :, 0, [1, 0, 2]], rtol=1e-5, atol=1e-6)


def test_expected_verdicts_and_categories():
    p = torch.zeros(4, 1, 2, 3)
    p[..., 0], p[..., 2] = 1.0, 0.0
    for i, high in enumerate((0.1, 0.2, 0.3, 0.4)):
        p[i, 0, 0] = torch.tensor([1 - high, 0, high])
        p[i, 0, 1] = torch.tensor([0, 1 - high, high])
    labels = Labels(p, ("c",), ("strict", "mild"))
    np.testing.assert_allclose(labels.expected()[:, 0], [[0.1, 0.55], [0.2, 0.6], [0.3, 0.65], [0.4, 0.7]], atol=1e-7)
    assert labels.categories()[:, 0].tolist() == [[0, 1]] * 4
    assert labels.categories(2)[:, 0].tolist() == [[0, 1]] * 4, "cut together, so the mild format is milder"
    assert labels.categories(4)[:, 0].tolist() == [[0, 2], [0, 2], [1, 3], [1, 3]]
    cells = labels.cells(4)
    assert cells["unit"] == [0, 0, 1, 1, 2, 2, 3, 3] and cells["format"] == ["strict", "mild"] * 4
    assert cells["criterion"] == ["c"] * 8 and cells["score"] == [0, 2, 0, 2, 1, 3, 1, 3]
    with pytest.raises(ValueError, match="levels is 1"):
        labels.categories(1)


def test_severities_of_formats_are_found():
    """Verdicts drawn from the measure's own model: strict formats are strict, and texts are where they were."""
    draw, tau = np.random.default_rng(0), np.array([-1.0, 0.0, 1.0])
    theta, alpha, delta = draw.normal(0, 1.5, 80), np.array([-0.8, 0.0, 0.8]), np.array([-0.5, 0.5])
    eta = theta[:, None, None] - delta[:, None] - alpha
    scores = (rasch.probabilities(eta, tau).cumsum(-1) < draw.random(eta.shape)[..., None]).sum(-1)
    labels = Labels(torch.nn.functional.one_hot(torch.tensor(scores), 4).float(), ("x", "y"), ("mild", "mid", "strict"))
    measure = rasch.fit(labels.cells(), item="criterion", rater="format")
    assert measure.raters.names == ("mild", "mid", "strict")
    assert (np.abs(measure.raters.severity - alpha) < 3 * measure.raters.se).all()
    assert np.corrcoef(measure.theta, theta)[0, 1] > 0.85


def test_refusals(tokenizer):
    def refused(message, rows=TEXTS, criteria=CRITERIA, formats=FORMATS, **options):
        with pytest.raises(ValueError, match=message) as error:
            label(tiny(), rows, criteria, formats, tokenizer=tokenizer, **options)
        assert "\n" not in str(error.value)

    refused("rows is empty", rows=[])
    refused(r"criteria is \[\]: pass a dictionary", criteria=[])
    refused(r"formats is \{\}: pass a dictionary", formats={})
    refused(r"formats have \[2, 3\] verdicts", formats={**FORMATS, "two": Format("{criterion}", ("a", "b"))})
    refused("'bare' has no {criterion}", formats={"bare": Format("{text}", ("a", "b"))})
    refused("choose 3 different ones", formats={"same": Format("{criterion} {text}", ("a", "a", "b"))})
    refused("batch_size is 0", batch_size=0)


@pytest.mark.slow
def test_judges_as_raters_compares_all_arms(tmp_path, monkeypatch):
    """A tiny model on made-up sentences; verdicts are asked once."""
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]
    draw = np.random.default_rng(0)
    lines = [f"The {' '.join(draw.choice(words, 8))} ." for _ in range(40)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    import wrong_words

    texts, degrees = wrong_words.sentences(str(tmp_path / "t.txt"), 0, 20)
    whole = {line[:-2] + "." for line in lines}
    assert [text in whole for text, d in zip(texts, degrees, strict=True) if d == 0] == [True] * 4
    assert sum(text in whole for text, d in zip(texts, degrees, strict=True) if d == 4) == 0
    tiny(std=0.5, vocab_size=300, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    verdicts = " ".join(sorted({answer for format in wrong_words.FORMATS.values() for answer in format.answers}))
    found = tiny_tokenizer(f"{' '.join(words)} {verdicts} " * 40)
    found.add_tokens([f" {answer}" for answer in verdicts.split()])
    found.save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(examples / "judges_as_raters.py"))
    monkeypatch.setitem(example["main"].__globals__, "TEXTS", 20)
    options = {"model": str(tmp_path / "model"), "seeds": 1, "output": tmp_path / "out"}
    results = example["main"](str(tmp_path / "t.txt"), **options)
    assert set(results) == set(example["ARMS"])
    assert all(-1 <= rows[0]["spearman"] <= 1 for rows in results.values())
    assert len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 20 * 3 * 6
    assert {"infit of digits", "severity of words"} <= set(results["measure"][0])
