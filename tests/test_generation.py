"""Metrics of samples by hand, unbiased sampling, and the temperature of an entropy."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import WatermarkingConfig

from hf_xent.generation.sampling import responses, sample, temperature_at, temperature_of
from hf_xent.metrics.diversity import distinct, features, mauve, repetition
from hf_xent.ops import Head
from hf_xent.patching import patch, patch_state
from support.models import V, batch, tiny


def test_distinct_and_repetition_by_hand():
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12 21 12 and 12
    assert repetition([[1, 2, 1, 2, 1], [1, 2, 3], [5]], 2) == pytest.approx(((1 - 2 / 4) + 0) / 2)
    assert math.isnan(distinct([[1]], 2)) and math.isnan(repetition([[1, 2, 3]]))


def test_samples_follow_the_model_and_leave_the_generator_alone():
    model = tiny(std=0.3)
    prompts = batch(rows=1, length=4)[0].expand(512, -1)
    before = torch.random.get_rng_state()
    found = sample(model, prompts, tokens=1, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before) and found == sample(model, prompts, tokens=1, seed=3)
    p = model(prompts[:1]).logits[0, -1].softmax(-1)
    first = torch.tensor([row[0] if row else 2 for row in found]).bincount(minlength=V) / 512  # 2 ends a sequence
    assert (first - p).abs().max() < 5 * (p.max() * (1 - p.max()) / 512) ** 0.5
    patch(model)
    assert found == sample(model, prompts, tokens=1, seed=3) and patch_state(model).streamed == 0
    cold = sample(model, prompts[:8], tokens=1, temperature=0.01)
    assert all(row == [int(p.argmax())] for row in cold)


@pytest.mark.parametrize(
    "own",
    [
        {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}, {"top_h": 0.1}, {"typical_p": 0.1}, {"num_beams": 3},
        {"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(40))},
        {"prompt_lookup_num_tokens": 3}, {"min_new_tokens": 12}, {"stop_strings": ["a"]}, {"max_time": 0.0},
        {"watermarking_config": WatermarkingConfig(bias=9.0)},
    ],
)  # fmt: skip
def test_samples_do_not_go_by_the_model_s_generation_configuration(own):
    model, prompts = tiny(std=0.3), [[5, 6, 7, 5, 6], [8]]
    expected = {heat: responses(model, prompts, tokens=12, seed=3, temperature=heat) for heat in (0.0, 1.0)}
    model.generation_config.update(**own)
    before = model.generation_config.to_dict()
    for heat, found in expected.items():
        assert responses(model, prompts, tokens=12, seed=3, temperature=heat) == found
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 2.5}, "tokens is 2.5"),
        ({"tokens": math.inf}, "tokens is inf"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"seed": None}, "seed is None"),
        ({"prompts": []}, "prompts has 0 rows"),
        ({"prompts": [[5], []]}, "at least one token in each"),
        ({"tokens": 62}, r"prompts \(3\) and tokens \(62\) is 65, but the model has 64 positions: choose at most 64"),
    ],
)
def test_samples_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        responses(tiny("gpt2"), **{"prompts": [[5, 6, 7]], **options})
    for count in (distinct, repetition):
        for n in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"n is {n!r}"):
                count([[1, 2]], n)
    texts = torch.randn(20, 4)
    for name, value in (("clusters", 0), ("clusters", 41), ("clusters", 2.5), ("scale", 0), ("scale", math.nan)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}: choose"):
            mauve(texts, texts, **{name: value})


def test_samples_end_at_the_end_token():
    model = tiny()
    model.generation_config.eos_token_id = list(range(50, V))
    found = sample(model, batch()[0], tokens=30)
    assert all(token < 50 for row in found for token in row) and any(len(row) < 30 for row in found)


def test_mauve_of_two_clusters_is_an_integral():
    """Two tight bundles of texts, 80 and 20 % of one set, 30 and 70 % of the other: the curve is known."""
    centers = 10 * torch.eye(3, 8)[:2]
    bundle = lambda first, n: centers[[0] * first + [1] * (n - first)] + 1e-3 * torch.randn(n, 8)  # noqa: E731
    found = mauve(bundle(80, 100), bundle(15, 50), clusters=2)
    p, q = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.3, 0.7]).double()
    curve = [(0.0, 0.0), (1.0, 0.0)]  # a polygon under the curve, to the axes
    for share in range(2001):
        r = share / 2000 * p + (1 - share / 2000) * q
        curve.append(tuple(math.exp(-5 * float((d * (d / r).log()).sum())) for d in (q, p)))
    area = sum(a * d - c * b for (a, b), (c, d) in pairwise([*curve, (0.0, 1.0), (0.0, 0.0)])) / 2  # shoelace
    assert found == pytest.approx(area, abs=2e-3)


def test_mauve_of_the_same_and_of_others():
    texts = torch.randn(400, 12)
    assert mauve(texts, texts) == pytest.approx(1, abs=1e-6)
    assert mauve(texts[:200], texts[200:]) > 0.8
    assert mauve(texts[:200], texts[200:] + 4) < 0.1
    assert mauve(texts[:200], texts[200:] + 0.5) < mauve(texts[:200], texts[200:]) - 0.1


def test_features_are_the_head_s_inputs():
    model, sequences = tiny(), [[5, 6, 7], [8, 9], [10]]
    found = features(model, sequences)
    for row, ids in zip(found, sequences, strict=True):
        # one row alone may be summed in another order than a sequence: float32 rounding of sums of D products
        torch.testing.assert_close(model.lm_head(row), model(torch.tensor([ids])).logits[0, -1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_responses_do_not_depend_on_padding(name):
    model = tiny(name, std=0.3)
    model.generation_config.eos_token_id = list(range(60, V))
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    together = responses(model, prompts, tokens=12, temperature=0.0)
    assert together == [responses(model, [prompt], tokens=12, temperature=0.0)[0] for prompt in prompts]
    several = [row for seed in range(8) for row in responses(model, prompts, tokens=12, seed=seed)]
    assert all(token < 60 for row in several for token in row[:-1]), "nothing after an end token"
    assert all(row[-1] >= 60 or len(row) == 12 for row in several) and any(row[-1] >= 60 for row in several)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_temperature_of_an_entropy(softcap):
    hidden, head, labels = torch.randn(4, 6, 16), Head(torch.randn(50, 16), softcap=softcap), torch.randint(50, (4, 6))
    labels[0, :3] = -100
    logp = (head.logits(hidden) / 0.6).log_softmax(-1)[labels != -100]
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    assert temperature_of(hidden, head, labels, entropy) == pytest.approx(0.6, rel=1e-4)
    with pytest.raises(ValueError, match=r"entropy is 9\.0: choose one from .* at temperatures"):
        temperature_of(hidden, head, labels, 9.0)


def test_temperature_at_which_a_model_has_an_entropy():
    model, ids = tiny("gemma2 softcap"), batch()[0]
    logp = (model(ids).logits[:, :-1] / 0.7).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    assert temperature_at(model, ids, entropy) == pytest.approx(0.7, rel=1e-4)
    assert "_hf_xent" not in model.__dict__
    state = patch_state(patch(model, "focal"))
    assert temperature_at(model, ids, entropy) == pytest.approx(0.7, rel=1e-4)
    assert patch_state(model) is state and state.materialized == 0
