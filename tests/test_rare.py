"""Rare events: against exact probabilities (closed forms, dynamic programming), plain sampling and finite differences."""

import math
from contextlib import contextmanager
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
    model = Bigram(BigramConfig(vocab_size=V, num_hidden_layers=1, eos_token_id=END, pad_token_id=END, use_cache=False)).eval()
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
    """No tilt: the same draws as `responses`' distribution, weights of exactly 1 and Wilson's interval."""
    with pytest.warns(UserWarning, match="the estimate rests on"):
        found = rare.estimate(bigram, [1], often(2), **OPTIONS, levels=0)
    assert found.probability == found.hits / 1000 and found.ess == pytest.approx(found.hits)
    assert found.interval == shares.wilson(found.hits, 1000) and found.tilt == {} and found.levels == ()
    share = found.probability
    assert found.standard_error == pytest.approx((share * (1 - share) / 999) ** 0.5)


@pytest.mark.parametrize(("bias", "temperature"), [({A: 2.5}, 1.0), ({A: 1.0, END: -1.0, 5: 0.5}, 1.4), ({}, 0.8)])
def test_a_fixed_tilt_is_unbiased_and_its_interval_covers(bigram, bias, temperature):
    """120 repetitions: their mean is the exact probability, and about 95 % of the intervals contain it."""
    exact, options = exactly(bigram, 1, 1, 6), {"tokens": 6, "draws": 300, "levels": 0, "batch_size": 300}
    found = [
        rare.estimate(bigram, [1], often(1), bias=bias, temperature=temperature, seed=seed, **options)
        for seed in range(120)
    ]
    values = [f.probability for f in found]
    assert abs(mean(values) - exact) < 3.5 * stdev(values) / 120**0.5
    assert mean(f.standard_error for f in found) == pytest.approx(stdev(values), rel=0.3)
    print(sum(f.interval[0] <= exact <= f.interval[1] for f in found))


def test_coverage(bigram):
    exact = exactly(bigram, 1, 4)
    for draws in (200,1000):
        found = [rare.estimate(bigram, [1], lambda t: t.count(A), 4.0, seed=seed, **{**OPTIONS, "draws": draws}) for seed in range(300)]
        cov=[1.0*(f.interval[0] <= exact <= f.interval[1]) for f in found]
        below=[1.0*(f.interval[1] < exact) for f in found]
        print(draws, mean(cov), mean(below), mean(f.ess for f in found), mean(f.probability for f in found)/exact)
