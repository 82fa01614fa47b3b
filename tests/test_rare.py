"""Rare events: against exact probabilities, closed forms or dynamic programming, and plain sampling."""

import math
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_xent.cem import elites, rare, tilting
from hf_xent.metrics import shares
from support.models import tiny, tiny_tokenizer

V, END, A, LENGTH = 7, 0, 3, 12


class BigramConfig(PreTrainedConfig):
    model_type = "bigram_of_a_test"


class Bigram(PreTrainedModel, GenerationMixin):
    """Its logits depend on the last token alone, so that probabilities of outputs follow by dynamic programming."""

    config_class = BigramConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        return CausalLMOutput(logits=self.table(input_ids))


@pytest.fixture(scope="module")
def bigram():
    """Token 3 is rare after every token; token 0 ends an output."""
    model = Bigram(
        BigramConfig(vocab_size=V, num_hidden_layers=1, eos_token_id=END, pad_token_id=END, use_cache=False)
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.table.weight.normal_()
        model.table.weight[:, A] -= 2.0
        model.table.weight[:, END] -= 1.5
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = END
    return model


def exactly(model, first, count, length=LENGTH):
    """P(token 3 occurs at least `count` times among up to `length` new tokens), by dynamic programming."""
    p = model.table.weight.double().softmax(-1).detach().numpy()
    state = np.zeros((V, count + 1))  # last token, occurrences so far; ended outputs are added up in `done`
    state[first, 0], done = 1.0, 0.0
    for _ in range(length):
        after = np.zeros_like(state)
        for token in range(V):
            mass = p[:, token] @ state
            if token == END:
                done += mass[count]
            elif token == A:
                after[token, 1:] += mass[:-1]
                after[token, count] += mass[count]
            else:
                after[token] += mass
        state = after
    return done + state[:, count].sum()


def often(count):
    return lambda tokens: tokens.count(A) >= count


def test_five_waiting_times():
    """P(sum of five Exp(1) > 25) is a Poisson sum; 20,000 draws estimate it within four of their standard errors."""
    exact = math.exp(-25) * sum(25**k / math.factorial(k) for k in range(5))
    assert exact == pytest.approx(2.66908e-7, rel=1e-5)
    found = [rare.probability(lambda x: x.sum(1), rare.Exponentials([1.0] * 5), 25.0, seed=seed) for seed in range(10)]
    assert all(abs(f.probability - exact) < 4 * f.standard_error and f.relative_error < 0.04 for f in found)
    assert sum(f.interval[0] <= exact <= f.interval[1] for f in found) >= 8
    assert all(f.levels[-1] == 25 and list(f.levels) == sorted(f.levels) for f in found)
    assert found[0].tilt == pytest.approx([5.2] * 5, rel=0.15), "means of five times whose sum is just above 25"


def test_without_a_level_to_climb_it_is_plain_monte_carlo_of_the_fitted_family():
    found = rare.probability(lambda x: x[:, 0], rare.Exponentials([2.0]), 2.0, draws=4000, rho=0.5)
    assert found.levels[-1] <= 2 and found.probability == pytest.approx(math.exp(-1), rel=0.08)


def test_one_level_by_hand():
    """Scores 1 ... 10, rho .2: elites 9 and 10, weighted mean (9 w + 10 w') / (w + w')."""
    family = rare.Exponentials([1.0])
    x = np.arange(1.0, 11)[:, None]
    weights = family.log_density(x, np.array([1.0])) - family.log_density(x, np.array([4.0]))
    assert weights == pytest.approx(-x[:, 0] + x[:, 0] / 4 + math.log(4))
    seen = []

    def fit(v, rows, scores, log_weights, level):
        seen.append(level)
        elite = scores >= level
        return family.fit(rows[elite], np.exp(log_weights[elite]))

    v, levels = rare.climbed(np.array([4.0]), lambda v: (x, x[:, 0], weights), fit, 100.0, 0.2, most=1)
    w, w_next = np.exp(weights[8:])
    assert levels == (9.0,) == tuple(seen) and v == pytest.approx((9 * w + 10 * w_next) / (w + w_next))


OPTIONS = {"tokens": LENGTH, "draws": 1000, "per_level": 400, "batch_size": 500}


@pytest.mark.parametrize("count", [2, 4])
def test_a_language_model_against_dynamic_programming(bigram, count):
    """A true-or-false event with few hits, and a score with levels for one that no first draw has."""
    exact = exactly(bigram, 1, count)
    event, threshold = (often(count), None) if count == 2 else (lambda tokens: tokens.count(A), float(count))
    found = [rare.estimate(bigram, [1], event, threshold, seed=seed, **OPTIONS) for seed in range(8)]
    assert all(abs(f.probability - exact) < 4 * f.standard_error for f in found)
    assert sum(f.interval[0] <= exact <= f.interval[1] for f in found) >= 6
    assert all(f.tilt[A] > 2 and f.ess > 80 and f.draws == 1000 for f in found)
    assert all(f.relative_error < 0.2 * (1 / (exact * f.draws)) ** 0.5 for f in found) or count == 2, "plain: 2.96"
    if count == 4:
        assert all(f.levels[0] < 4 and f.levels[-1] == 4 for f in found)


def test_plain_sampling_is_the_mean_of_the_indicator(bigram):
    """No tilt: weights of exactly 1, Wilson's interval and, at equal draws, fifteen times the error of a tilt."""
    with pytest.warns(UserWarning, match=r"the estimate rests on \d+ of 1000 draws, as good as"):
        found = rare.estimate(bigram, [1], often(2), **OPTIONS, levels=0)
    share = found.probability
    assert share == found.hits / 1000 and found.ess == pytest.approx(found.hits)
    assert found.standard_error == pytest.approx((share * (1 - share) / 999) ** 0.5)
    assert found.interval == shares.wilson(found.hits, 1000) and found.tilt == {} and found.levels == ()
    with pytest.warns(UserWarning, match="the estimate rests on 0 of 1000"):
        none = rare.estimate(bigram, [1], often(5), **OPTIONS, levels=0)
    assert (none.probability, none.ess, none.relative_error) == (0, 0, math.inf) and none.interval[1] < 0.01


@pytest.mark.parametrize(("bias", "temperature"), [({A: 2.5}, 1.0), ({A: 1.0, END: -1.0, 5: 0.5}, 1.4), ({}, 0.8)])
@pytest.mark.filterwarnings("ignore:the estimate rests on")
def test_a_fixed_tilt_is_unbiased_and_its_interval_covers(bigram, bias, temperature):
    """120 repetitions: their mean is the exact probability, and 95 % of the intervals contain it, give or take."""
    exact, options = exactly(bigram, 1, 1, 6), {"tokens": 6, "draws": 300, "levels": 0, "batch_size": 300}
    found = [
        rare.estimate(bigram, [1], often(1), bias=bias, temperature=temperature, seed=seed, **options)
        for seed in range(120)
    ]
    values = [f.probability for f in found]
    assert abs(mean(values) - exact) < 3.5 * stdev(values) / 120**0.5
    assert mean(f.standard_error for f in found) == pytest.approx(stdev(values), rel=0.25)
    covered = sum(f.interval[0] <= exact <= f.interval[1] for f in found)
    assert 106 <= covered <= 120, "of Binomial(120, .95), which is below 106 with probability 0.1 %"
    assert all(f.tilt == bias for f in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the estimate rests on")
@pytest.mark.parametrize("draws", [200, 1000])
def test_the_interval_covers_a_tilt_that_was_searched(bigram, draws):
    """300 searches for an event of 1 in 9,000; at 200 draws their effective number is 23."""
    exact, options = exactly(bigram, 1, 4), {**OPTIONS, "draws": draws}
    score = lambda tokens: tokens.count(A)  # noqa: E731
    found = [rare.estimate(bigram, [1], score, 4.0, seed=seed, **options) for seed in range(300)]
    covered = sum(f.interval[0] <= exact <= f.interval[1] for f in found)
    assert 273 <= covered <= 296, "of Binomial(300, .95), each tail with probability 0.2 %"
    assert mean(f.probability for f in found) == pytest.approx(exact, rel=0.02)


def test_several_prompts_take_turns(bigram):
    """The mean of their probabilities; and the levels, the draws and the generator of torch do not depend on before."""
    exact = mean(exactly(bigram, first, 2) for first in (1, 5, 4))
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    found = rare.estimate(bigram, [[1], [2, 5], [4]], often(2), **OPTIONS)
    assert torch.rand(1) == expected and abs(found.probability - exact) < 4 * found.standard_error
    assert rare.estimate(bigram, [[1], [2, 5], [4]], often(2), **OPTIONS) == found


def test_log_weights_are_exact_and_end_with_the_output():
    """A transformer with a bias, against log p - log q of whole sequences, token by token; prompts of two lengths."""
    model, bias, rows = tiny(), {5: 3.0, 2: 6.0}, []
    settings = tilting.settled({"tokens": 6, "bias": bias, "temperature": 1.3})

    def event(tokens):
        rows.append(tokens)
        return 5 in tokens

    with tilting.sampler(model, [[7, 8, 9], [11]], event, settings) as drawn:
        found, _, log_weights = drawn(bias, 16, "draws")
    assert [new for _, new in found] == rows and any(row[-1] == 2 and len(row) < 6 for row in rows)
    for (which, new), weight in zip(found, log_weights, strict=True):
        prompt = [[7, 8, 9], [11]][which]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].double()
        scores = logits / 1.3
        scores[:, 5] += 3.0
        scores[:, 2] += 6.0
        ratio = logits.log_softmax(-1) - scores.log_softmax(-1)
        assert weight == pytest.approx(ratio[range(len(new)), new].sum().item(), abs=1e-4)


def test_the_bias_is_a_maximum_of_weighted_likelihood():
    """The gradient of F in the docstring vanishes, by finite differences of F written out step by step."""
    rng = np.random.default_rng(0)
    base = rng.dirichlet(np.ones(6), 40)[:, :3]
    counted = np.zeros((40, 3))
    counted[range(20), rng.integers(0, 3, 20)] = 1
    weights, start = rng.uniform(0.1, 2, 40), np.array([0.5, 0.0, -1.0])

    def objective(b):
        log_z = [math.log(1 + sum(p[k] * (math.exp(b[k]) - 1) for k in range(3))) for p in base]
        return sum(w * (b @ n - z) for w, n, z in zip(weights, counted, log_z, strict=True)) - sum((b - start) ** 2) / 2

    best = elites.maximum(base, counted, weights, start)
    for step in 1e-5 * np.eye(3):
        assert (objective(best + step) - objective(best - step)) / 2e-5 == pytest.approx(0, abs=1e-4)
    q = base * np.exp(best)
    q /= (q.sum(1) + 1 - base.sum(1))[:, None]
    assert weights @ counted == pytest.approx(weights @ q + best - start, abs=1e-6), "moments match, but for the prior"
    assert abs(elites.maximum(base[:, :1], 0 * counted[:, :1], weights, np.zeros(1))[0]) < 10, "an unused token"


def test_tokens_that_stand_out():
    """Token 4 is in every elite and nowhere else; 6 is missing there; the others are as in all outputs."""
    outputs = [[1, 4, 4], [1, 2, 4]] * 15 + [[1, 2, 6, 6]] * 60 + [[1, 6, 6, 2]] * 60
    elite = np.arange(150) < 30
    assert elites.outstanding(outputs, elite, np.ones(30), [], 8) == [4, 6]
    assert elites.outstanding(outputs, elite, np.ones(30), [4], 8) == [6]
    assert elites.outstanding(outputs, elite, np.ones(30), [4], 1) == []
    outputs[0] = [1, 4, 5, 5, 5]
    assert 5 not in elites.outstanding(outputs, elite, np.ones(30), [], 8), "it is in one elite alone"


def test_texts_are_read_with_a_tokenizer():
    tokenizer, model, seen = tiny_tokenizer("the quick brown fox jumps over the lazy dog"), tiny(std=0.05), []
    options = {"tokenizer": tokenizer, "tokens": 3, "draws": 8, "levels": 0}
    with pytest.warns(UserWarning, match="the estimate rests on"):
        found = rare.estimate(model, ["the fox", "dog"], lambda text: seen.append(text) or "o" in text, **options)
    assert len(seen) == 8 and all(isinstance(text, str) for text in seen) and found.draws == 8


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1], often(1)), {"token": 3}, "estimate does not take token: its options are tokens, draws"),
        (([1], often(1)), {"tokens": 0}, "tokens is 0: choose a whole number of at least 1"),
        (([1], often(1)), {"temperature": 0}, "temperature is 0: choose a number in"),
        (([1], often(1)), {"bias": {3: math.inf}}, "bias is .* finite numbers"),
        (([1], often(1)), {"bias": {V: 1.0}}, "bias has the token 7, but the model has 7 tokens"),
        (([1], often(1)), {"rho": 1}, r"rho is 1, threshold 1.0: choose rho in \(0, 1\)"),
        (([], often(1)), {}, "prompts has 0 rows: pass at least one"),
        (("text", often(1)), {}, "prompts is text: pass a tokenizer"),
        (([1], lambda tokens: math.nan, 1.0), {}, "event gives NaN"),
        (([1], lambda tokens: "rare", 1.0), {}, "the event's score is 'rare': give one number"),
        (([1], often(12)), {}, "all 500 draws of a level have the score 0, below 1: take more draws"),
    ],
)
def test_what_cannot_be_estimated_is_refused(bigram, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rare.estimate(bigram, *arguments, **options)


def test_what_cannot_be_a_probability_is_refused():
    for means in ([], [1.0, 0.0], [[1.0]]):
        with pytest.raises(ValueError, match="give one positive number for each variable"):
            rare.Exponentials(means)
    with pytest.raises(ValueError, match=r"score has shape \(\) and 0 NaN for 2000 draws"):
        rare.probability(lambda x: x.sum(), rare.Exponentials([1.0]), 3.0)
