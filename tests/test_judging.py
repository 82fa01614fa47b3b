"""Judges and pairs: the worked example, a judge against the softmax of full logits, orders, batches, refusals."""

import math

import peft
import pytest
import torch

from hf_xent.data import Format
from hf_xent.generation import judging
from hf_xent.generation.judging import ModelJudge, Pair, both_orders, quality, ranked_pairs, strength
from hf_xent.patching import patch, patch_state
from support.models import SETTINGS, V, tiny, tiny_tokenizer
from support.oracle import Largest

FORMAT = Format("{prompt} over {first} or {second} is", ("a", "b"))
ROWS = [{"prompt": text} for text in ("the fox", "the lazy dog jumps", "brown")]
FIRST, SECOND = ["the dog", "a fox", "quick quick quick"], ["the lazy lazy dog", "the", "brown fox"]


@pytest.fixture
def tokenizer():
    found = tiny_tokenizer("the quick brown fox jumps over the lazy dog or is a b " * 8)
    assert len(found) < V
    return found


@torch.no_grad()
def dense(model, tokenizer, row, first, second):
    """s(first, second) from the softmax over the whole vocabulary, one prompt, no padding, no patch."""
    text = f"{row['prompt']} over {first} or {second} is"
    ids = tokenizer(text)["input_ids"]
    a, b = (tokenizer(f"{text} {verdict}")["input_ids"][-1] for verdict in "ab")
    p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    return float(p[a] / (p[a] + p[b]))


def test_the_worked_example():
    """p = 1/2 (.9 + .7) of two orders; strengths of p = .9, .6, .3 against a baseline."""
    judge = lambda rows, first, second: [0.9 if first[0] == "y1" else 0.3]  # noqa: E731
    assert both_orders(judge, [{}], ["y1"], ["y2"]).p.item() == pytest.approx(0.8)
    p = [0.9, 0.6, 0.3]
    assert strength(0.9, 0.6) == pytest.approx(0.857143, abs=1e-6)
    assert strength(0.9, 0.3) == pytest.approx(0.954545, abs=1e-6)
    assert strength(0.6, 0.3) == pytest.approx(0.777778, abs=1e-6)
    assert ranked_pairs(p) == [Pair(0, 2, strength(0.9, 0.3))]
    shuffled = [0.3, 0.9, 0.6]
    assert [(x.chosen, x.rejected) for x in ranked_pairs(shuffled, "adjacent")] == [(1, 2), (2, 0)]
    assert [(x.chosen, x.rejected) for x in ranked_pairs(shuffled, "all")] == [(1, 2), (1, 0), (2, 0)]


def test_strengths_are_bradley_terry():
    """Transitive in log-odds, antisymmetric, finite under clipping, a half for equals in the order they came."""
    odds = lambda p: math.log(p / (1 - p))  # noqa: E731
    assert odds(strength(0.9, 0.6)) + odds(strength(0.6, 0.3)) == pytest.approx(odds(strength(0.9, 0.3)))
    assert strength(0.2, 0.7) + strength(0.7, 0.2) == pytest.approx(1, abs=1e-15)
    assert odds(strength(1.0, 0.0, eps=0.1)) == pytest.approx(2 * odds(0.9))
    assert ranked_pairs([0.5, 0.5, 0.5], "all") == [Pair(0, 1, 0.5), Pair(0, 2, 0.5), Pair(1, 2, 0.5)]
    for scheme, count in (("best_worst", 1), ("adjacent", 4), ("all", 10)):
        pairs = ranked_pairs([0.1, 0.9, 0.4, 0.4, 0.7], scheme)
        assert len(pairs) == count == len(judging.SCHEMES[scheme](5)) and all(x.strength >= 0.5 for x in pairs)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "bert bias", *SETTINGS])
def test_a_model_judges_as_its_full_softmax_does(name, tokenizer):
    """Scale, softcap and bias of the head included; three prompts of unequal length in one padded batch."""
    model = tiny(name, vocab_size=V)
    expected = [dense(model, tokenizer, *shown) for shown in zip(ROWS, FIRST, SECOND, strict=True)]
    assert max(expected) - min(expected) > 1e-3
    found = ModelJudge(model, tokenizer, FORMAT)(ROWS, FIRST, SECOND)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert "_hf_xent" not in model.__dict__, "patched for the occasion"


def test_orders_and_batches_do_not_matter(tokenizer):
    model = tiny()
    judge = ModelJudge(model, tokenizer, FORMAT)
    forth, back = both_orders(judge, ROWS, FIRST, SECOND), both_orders(judge, ROWS, SECOND, FIRST)
    torch.testing.assert_close(forth.p + back.p, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(forth.steady, back.steady)
    alone = ModelJudge(model, tokenizer, FORMAT, batch_size=1)
    # a quarter of the rounding of a difference of two float32 logits, which are about 10
    torch.testing.assert_close(both_orders(alone, ROWS, FIRST, SECOND).p, forth.p, rtol=0, atol=1e-5)
    same = both_orders(judge, ROWS, FIRST, FIRST)
    assert same.p.tolist() == [0.5] * 3, "a response against itself, whatever the judge likes"


def test_a_liking_for_a_place_cancels():
    first_place = both_orders(lambda rows, *_: [0.8] * len(rows), ROWS, FIRST, SECOND)
    assert first_place.p.tolist() == [0.5] * 3 and not first_place.steady.any()
    program = both_orders(
        lambda rows, a, b: [float(len(x) > len(y)) for x, y in zip(a, b, strict=True)], ROWS, FIRST, SECOND
    )
    assert program.p.tolist() == [0, 1, 1] and program.steady.all()


def test_quality_is_accuracy_and_brier_by_hand():
    """Of three pairs one is judged well, one badly, one not at all; a liking for the first place changes nothing."""
    likes = {"the dog": 0.8, "a fox": 0.5, "quick quick quick": 0.4}
    fair = lambda rows, a, b: [likes.get(x, 1 - likes.get(y, 1)) for x, y in zip(a, b, strict=True)]  # noqa: E731
    biased = lambda *shown: [p + 0.125 for p in fair(*shown)]  # noqa: E731
    for judge in (fair, biased):
        accuracy, brier = quality(judge, ROWS, FIRST, SECOND)
        assert accuracy == pytest.approx((1 + 0.5 + 0) / 3) and brier == pytest.approx((0.2**2 + 0.5**2 + 0.6**2) / 3)
    assert all(math.isnan(value) for value in quality(fair, [], [], []))


def test_adapters_and_modes(tokenizer):
    """A PEFT model judges with its adapter, without dropout, and is left in the mode and with the gradients it had."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    base = tiny()
    plain = ModelJudge(base, tokenizer, FORMAT)(ROWS, FIRST, SECOND)
    model = peft.get_peft_model(base, config)
    model.eval()
    expected = [dense(model, tokenizer, *shown) for shown in zip(ROWS, FIRST, SECOND, strict=True)]
    model.train()
    found = ModelJudge(model, tokenizer, FORMAT)(ROWS, FIRST, SECOND)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert model.training and not found.requires_grad and (found - plain).abs().max() > 1e-4
    with model.disable_adapter():
        torch.testing.assert_close(ModelJudge(model, tokenizer, FORMAT)(ROWS, FIRST, SECOND), plain)


def test_no_logits_and_the_patch_stays(tokenizer):
    model = patch(tiny(vocab_size=4099))
    state = patch_state(model)
    with Largest() as largest:
        ModelJudge(model, tokenizer, FORMAT)(ROWS, FIRST, SECOND)
    assert patch_state(model) is state and state.streamed == state.materialized == 0 and largest.numel < 3 * 4099


def test_templates_see_rows_and_chats(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    chat = [{"role": "user", "content": "the fox"}]
    assert judging.text_of("the fox") == judging.text_of(chat) == "the fox"
    assert judging.text_of([*chat, {"role": "assistant", "content": "is"}]) == "user: the fox\nassistant: is"
    seen = []

    class Spy(ModelJudge):
        def _odds(self, prompts, verdicts):
            seen.extend(tokenizer.decode(prompt) for prompt in prompts)
            return super()._odds(prompts, verdicts)

    judge = Spy(tiny(), tokenizer, Format("{prompt} {rule} {first} {second}", ("a", "b")))
    judge([{"prompt": chat, "rule": "lazy"}], ["dog"], ["{first}"])
    assert [text.replace(" ", "") for text in seen] == [
        tokenizer.decode(tokenizer("<s>the fox lazy dog {first}</s><s>")["input_ids"]).replace(" ", "")
    ]


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match=r"choose two different ones that are always one token each"):
        ModelJudge(tiny(), tokenizer, Format("{prompt}", ("a a", "b")))(ROWS, FIRST, SECOND)
    with pytest.raises(ValueError, match=r"choose two different ones that are always one token each"):
        ModelJudge(tiny(), tokenizer, Format("{prompt}", ("a", "a")))(ROWS, FIRST, SECOND)
    for wrong in ([0.5], [0.5, 1.5, 0.5], [0.5, float("nan"), 0.5]):
        with pytest.raises(ValueError, match="the judge answered 3 comparisons"):
            both_orders(lambda *_, wrong=wrong: wrong, ROWS, FIRST, SECOND)
    assert len(ModelJudge(tiny(), tokenizer)([], [], [])) == 0
    with pytest.raises(ValueError, match="batch_size is 0"):
        ModelJudge(tiny(), tokenizer, FORMAT, batch_size=0)(ROWS, FIRST, SECOND)
    with pytest.raises(ValueError, match=r"a prompt with two responses has \d+ tokens, but the model has 64 positions"):
        ModelJudge(tiny("gpt2"), tokenizer, FORMAT)([{"prompt": "the quick " * 60}], ["a"], ["b"])
    for eps in (0, 0.5, -1, math.nan):
        with pytest.raises(ValueError, match=f"eps is {eps}"):
            ranked_pairs([0.5, 0.6], eps=eps)
    for p in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="pass probabilities"):
            strength(p, 0.5)
    with pytest.raises(ValueError, match="scheme is 'some': choose one of best_worst"):
        ranked_pairs([0.5, 0.6], "some")
