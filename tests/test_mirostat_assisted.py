"""Mirostat under assisted decoding: every token from the distribution of plain Mirostat, whatever is proposed."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from hf_xent.generation.mirostat import PROPOSALS, Mirostat, generate
from support.models import tiny

PROMPT = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
OPTIONS = {"max_new_tokens": 24, "eos_token_id": -1, "pad_token_id": 0}
pytestmark = pytest.mark.filterwarnings("ignore:Passing `generation_config` together")


@pytest.fixture(scope="module")
def model():
    return tiny(std=0.6)


def near(model, noise):
    """An assistant: the model with other weights, a little."""
    other = tiny(std=0.6)
    torch.manual_seed(1)
    for weight in other.parameters():
        weight.data += noise * torch.randn_like(weight)
    return other


def assisted(model, prompt, how, **options):
    """A sample of assisted decoding, and in how many forward passes of the model it was made."""
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        return generate(model, prompt, assisted=True, **how, **options), len(passes)
    finally:
        hook.remove()


HOW = {"assistant": "assistant_model", "lookup": "prompt_lookup_num_tokens"}
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}


@pytest.mark.parametrize("kind", HOW)
@pytest.mark.parametrize("settings", [{}, {"surprise": "truncated", "rate": 0.3}, {"version": 1}, {"temperature": 0.6}])
def test_tokens_come_from_the_distribution_of_plain_mirostat(model, kind, settings):
    """The scores of every accepted or drawn token are those of plain Mirostat that is given the same tokens."""
    how = {HOW[kind]: near(model, 0.05)} if kind == "assistant" else LOOKUP
    options = {"target": 4.0, **settings}
    passes = tokens = 0
    kept = set()
    for seed in range(2):
        torch.manual_seed(seed)
        more = {**OPTIONS, "output_scores": True, "return_dict_in_generate": True}
        found, count = assisted(model, PROMPT, how, **options, **more)
        passes, tokens = passes + count, tokens + len(found.scores)
        plain = Mirostat(**options)
        logits = model(found.sequences).logits.detach()
        for i, scores in enumerate(found.scores, start=PROMPT.shape[1]):
            expected = plain(found.sequences[:, :i], logits[:, i - 1])
            torch.testing.assert_close(scores.softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-4)
            kept.add(int(expected.isfinite().sum()))
    assert passes < tokens or kind == "lookup"  # proposals are accepted
    assert passes > 4 and len(kept) > 4  # some are not, and the bound changes


def test_a_low_target_is_greedy_decoding(model):
    expected = model.generate(PROMPT, do_sample=False, **OPTIONS)
    for how in ({"assistant_model": near(model, 0.05)}, LOOKUP):
        assert torch.equal(assisted(model, PROMPT, how, target=1e-3, **OPTIONS)[0], expected)


def test_an_equal_assistant_is_always_right(model):
    torch.manual_seed(0)
    found, passes = assisted(model, PROMPT, {"assistant_model": tiny(std=0.6)}, target=2.0, **OPTIONS)
    assert found.shape[1] == PROMPT.shape[1] + 24 and passes <= 3  # 20 proposals at once


def test_the_processor_alone_does_it_too(model):
    mirostat, options = Mirostat(2.0, assisted=True), {"do_sample": True, "top_k": 0, "top_p": 1.0, **OPTIONS}
    torch.manual_seed(0)
    other = near(model, 0.1)
    found = model.generate(PROMPT, logits_processor=[mirostat], assistant_model=other, **options)
    logp = model(found).logits.detach().log_softmax(-1)[0, PROMPT.shape[1] - 1 : -1]
    surprise = -logp.gather(-1, found[0, PROMPT.shape[1] :, None])[:, 0] / math.log(2)
    seen = torch.cat(mirostat.observed)  # to the last proposal, of which the first ones were accepted
    torch.testing.assert_close(seen[:20], surprise[:20], rtol=1e-4, atol=1e-4)


def test_going_back_has_an_end():
    mirostat, scores = Mirostat(2.0, assisted=True), torch.zeros(1, 4)
    ids = torch.zeros(1, PROPOSALS + 4, dtype=torch.long)
    for length in range(1, PROPOSALS + 4):
        mirostat(ids[:, :length], scores)
    mirostat(ids[:, :5], scores)
    for length in range(6, PROPOSALS + 5):
        mirostat(ids[:, :length], scores)
    with pytest.raises(ValueError, match=f"more than {PROPOSALS} tokens were proposed"):
        mirostat(ids[:, :3], scores)


def exact(model, prompt, tokens, target, rate):
    """The probability of every continuation under plain Mirostat, by the paper's rule, one token after the other."""
    found = {(): (1.0, 2 * target)}
    for _ in range(tokens):
        longer = {}
        for sequence, (probability, mu) in found.items():
            ids = torch.cat([prompt, torch.tensor([sequence], dtype=torch.long)], 1)
            p = model(ids).logits[0, -1].double().softmax(-1).tolist()
            kept = [x for x, q in enumerate(p) if -math.log2(q) <= mu] or [max(range(len(p)), key=p.__getitem__)]
            mass = sum(p[x] for x in kept)
            for x in kept:
                longer[(*sequence, x)] = (probability * p[x] / mass, mu - rate * (-math.log2(p[x]) - target))
        found = longer
    return {sequence: probability for sequence, (probability, _) in found.items()}


def fits(counts, expected, total):
    """The p-value of counts for probabilities, rare continuations together."""
    common = [s for s, p in expected.items() if total * p >= 5]
    seen = [counts[s] for s in common]
    wanted = [total * expected[s] for s in common]
    rest = total - sum(wanted)
    if rest >= 1:
        seen, wanted = [*seen, total - sum(seen)], [*wanted, rest]
    wanted = [w * sum(seen) / sum(wanted) for w in wanted]
    return chisquare(seen, wanted).pvalue


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", HOW)
def test_frequencies_of_continuations_are_those_of_plain_mirostat(kind):
    sizes = {"vocab_size": 6, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = tiny(std=0.35, **sizes)
    other = tiny(std=0.35, **sizes)
    for weight in other.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    prompt, total = torch.tensor([[1, 2, 3, 4, 5, 1, 2]]), 1500
    how = {HOW[kind]: other if kind == "assistant" else 2}
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "target": 1.2, "rate": 1.0}
    torch.manual_seed(0)
    passes, counts = 0, Counter()
    for _ in range(total):
        found, count = assisted(model, prompt, how, **options)
        counts[tuple(found[0, prompt.shape[1] :].tolist())] += 1
        passes += count
    assert passes < 3.9 * total  # proposals are accepted
    expected = exact(model, prompt, 4, 1.2, 1.0)
    assert sum(expected.values()) == pytest.approx(1) and set(counts) <= set(expected)
    assert fits(counts, expected, total) > 0.001
    for wrong in (exact(model, prompt, 4, 1.2, 1e-9), exact(model, prompt, 4, 1.6, 1.0)):  # one bound; another target
        full = dict.fromkeys(itertools.product(range(6), repeat=4), 1e-12) | wrong
        assert fits(counts, full, total) < 1e-6
