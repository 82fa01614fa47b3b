"""Mirostat against the paper's algorithm written out token by token, and against the model's own log-probabilities."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, WatermarkingConfig

from hf_xent.generation.mirostat import Mirostat, by_surprise, export, generate
from hf_xent.generation.zipf import by_zipf, zipf_k
from support.models import V, batch, tiny

ENDLESS = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}  # no token ends a sequence


def paper_k(p, mu):
    """Algorithm 1 for one row of probabilities."""
    p = sorted(p, reverse=True)
    m = min(100, len(p))
    t = [math.log((i + 1) / i) for i in range(1, m)]
    b = [math.log(p[i - 1] / p[i]) for i in range(1, m)]
    s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    e = s - 1
    return ((e * 2**mu) / (1 - len(p) ** -e)) ** (1 / s)


@pytest.mark.parametrize("size", [30, 400])
@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_version_1_keeps_the_paper_s_k(size, sharpness):
    logp = (sharpness * torch.randn(3, size, dtype=torch.float64)).log_softmax(-1)
    mu = torch.tensor([1.0, 3.0, 5.0])
    keep = by_zipf(logp, mu)
    for row, bound, kept in zip(logp, mu.tolist(), keep, strict=True):
        k = min(size, max(1, round(paper_k(row.exp().tolist(), bound))))
        assert kept.sum() == k and set(row.topk(k).indices.tolist()) == set(kept.nonzero().squeeze(-1).tolist())


def test_exponent_one_is_a_limit_and_nothing_overflows():
    one, mu = torch.tensor([1.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    assert zipf_k(one, mu, 10**4) == round(2**4 / math.log(10**4))
    for s in (1 - 1e-5, 1 + 1e-5):
        assert zipf_k(s * one, mu, 10**4) == zipf_k(one, mu, 10**4)
    extremes = [
        zipf_k(torch.tensor([s]).double(), torch.tensor([mu]).double(), 50) for s in (1e-3, 9) for mu in (-9, 9e3)
    ]
    assert [int(k) for k in extremes] == [1, 50, 1, 50]
    forbidden = torch.full((1, 50), -torch.inf)
    forbidden[0, 7:9] = math.log(0.5)  # probabilities of zero are no part of the fit
    assert by_zipf(forbidden, torch.tensor([-5.0]))[0].sum() == 1
    assert by_zipf(forbidden, torch.tensor([9.0]))[0, 7:9].all()


def test_version_2_keeps_what_surprises_no_more_than_mu_and_at_least_one():
    logp = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().expand(3, -1)
    kept = by_surprise(logp, torch.tensor([2.0, 1.5, -3.0]))
    assert kept.tolist() == [[True, True, True, False], [True, False, False, False], [True, False, False, False]]


def surprises(model, sequences, length, temperature=1.0):
    """Bits of every token after `length`, from one stock forward over the whole sequences."""
    logp = (model(sequences).logits.detach()[:, :-1] / temperature).log_softmax(-1)
    return -logp.gather(-1, sequences[:, 1:, None]).squeeze(-1)[:, length - 1 :] / math.log(2)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma2 softcap"])
def test_observed_surprise_is_the_whole_model_s_one_mu_a_sequence(name, version):
    model, (ids, _) = tiny(name), batch()
    mirostat = Mirostat(2.0, 0.5, version=version, temperature=1.3)
    options = {**ENDLESS, "do_sample": True, "top_k": 0, "logits_processor": [mirostat]}
    found = model.generate(ids, **options)
    seen = surprises(model, found, ids.shape[1], 1.3)
    observed = torch.stack(mirostat.observed, 1)  # of all tokens but the last, after which nobody asks
    torch.testing.assert_close(observed, seen[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mirostat.mu, 4.0 - 0.5 * (observed - 2.0).sum(-1), rtol=1e-4, atol=1e-4)
    assert (observed.std(0) > 0).any()  # rows differ, and so do their bounds
    if version == 2:  # every token is within its bound, or the likeliest one
        bound = 4.0 - 0.5 * torch.cat([torch.zeros(3, 1), (observed - 2.0).cumsum(-1)], 1)
        likeliest = found[:, ids.shape[1] :] == model(found).logits[:, ids.shape[1] - 1 : -1].argmax(-1)
        assert ((seen <= bound + 1e-3) | likeliest).all()
    model.generate(ids, **options)  # a new call begins anew
    assert len(mirostat.observed) == ENDLESS["max_new_tokens"] - 1


def test_truncated_surprise_is_that_of_the_distribution_drawn_from():
    mirostat = Mirostat(1.0, surprise="truncated")
    scores = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).log()
    kept = mirostat(torch.tensor([[9]]), scores)  # mu = 2 bits: the first two
    assert kept.isfinite().tolist() == [[True, True, False, False]]
    mirostat(torch.tensor([[9, 1]]), scores)
    assert mirostat.observed[0] == pytest.approx(-math.log2(0.25 / 0.75))


def test_a_sequence_that_ended_is_frozen():
    mirostat = Mirostat(2.0, eos=[1])
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    ids = torch.tensor([[9], [9]])
    for tokens in ((1, 0), (0, 0), (0, 2)):  # the first row ends at once
        mirostat(ids, scores)
        ids = torch.cat([ids, torch.tensor(tokens)[:, None]], 1)
    mirostat(ids, scores)
    first, second = torch.stack(mirostat.observed, 1)
    assert first[0] == 2.0 and first[1:].isnan().all() and second.tolist() == [1.0, 1.0, 2.0]
    assert mirostat.mu.tolist() == [4.0, 4.0 + 1 + 1]


def test_generate_switches_other_truncation_off_and_leaves_the_configuration_alone():
    model, (ids, _) = tiny(std=0.05), batch(rows=64)  # flat: the model's own surprise is about log2 97
    model.generation_config.top_k = 3
    before = model.generation_config.to_dict()
    options = {"target": 6.5, "max_new_tokens": 2, "eos_token_id": -1, "pad_token_id": 0}
    found = generate(model, ids, **options)
    rank = (model(found).logits[:, -3:-1].argsort(-1, descending=True) == found[:, -2:, None]).int().argmax(-1)
    assert rank.max() > 50  # what transformers' default top-k would have cut
    assert model.generation_config.to_dict() == before
    for name, value in {"top_k": 5, "num_beams": 2, "assistant_model": model}.items():
        with pytest.raises(ValueError, match=f"{name} is given, but Mirostat alone"):
            generate(model, ids, **{name: value})


@pytest.mark.parametrize(("std", "target"), [(0.8, 2.0), (0.5, 4.0)])
def test_a_target_between_greedy_s_surprise_and_the_model_s_is_held(std, target):
    model, (ids, _) = tiny(std=std), batch(rows=8, length=4)
    options = {**ENDLESS, "max_new_tokens": 50}
    greedy = model.generate(ids, do_sample=False, **options)
    plain = model.generate(ids, do_sample=True, top_k=0, **options)
    low, high = (surprises(model, found, 4).mean().item() for found in (greedy, plain))
    assert low < target - 0.5 and high > target + 0.5
    found = generate(model, ids, target=target, **options)
    assert surprises(model, found, 4).mean().item() == pytest.approx(target, abs=0.15)


@pytest.mark.parametrize("version", [1, 2])
def test_a_target_and_a_rate_for_each_prompt(version):
    """The rows of a batch do what each does with its own numbers, `num_return_sequences` times."""
    model, ids = tiny(std=0.8), batch()[0]
    targets, rates = [1.5, 2.5, 3.5], [0.5, 1.0, 0.25]
    torch.manual_seed(0)
    options = {**ENDLESS, "version": version, "num_return_sequences": 2, "output_scores": True}
    found = generate(model, ids, target=targets, rate=torch.tensor(rates), return_dict_in_generate=True, **options)
    for row, sequence in enumerate(found.sequences):
        alone = Mirostat(targets[row // 2], rates[row // 2], version=version)
        logits = model(sequence[None]).logits.detach()
        for i, scores in enumerate(found.scores, start=ids.shape[1]):
            kept = alone(sequence[None, :i], logits[:, i - 1]).softmax(-1)[0]
            torch.testing.assert_close(scores[row].softmax(-1), kept, rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    same = generate(model, input_ids=ids, target=np.array([2.0] * 3), **ENDLESS)
    torch.manual_seed(0)
    assert torch.equal(same, generate(model, ids, target=2.0, **ENDLESS))


def test_export_runs_as_custom_generate(tmp_path):
    model, (ids, _) = tiny(), batch()
    model.save_pretrained(tmp_path)
    export(tmp_path)
    options = {**ENDLESS, "target": 1.5, "trust_remote_code": True}
    expected = []
    for call in ({"inputs": ids}, {"input_ids": ids}):
        torch.manual_seed(5)
        expected.append(model.generate(**call, custom_generate=str(tmp_path), **options))
    torch.manual_seed(5)
    ours = generate(model, ids, **{**ENDLESS, "target": 1.5})
    assert torch.equal(ours, expected[0]) and torch.equal(ours, expected[1])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True
    )  # its `generate` is the repository's
    torch.manual_seed(5)
    assert torch.equal(loaded.eval().generate(inputs=ids, **{**ENDLESS, "target": 1.5}), ours)


OTHERS = {
    "top_k": 5, "top_p": 0.9, "min_p": 0.1, "top_h": 0.4, "typical_p": 0.5, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3,
    "num_beams": 2, "do_sample": False, "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1,
    "num_assistant_tokens": 4, "use_mtp": True, "dola_layers": "low", "diversity_penalty": 0.5, "constraints": [1],
    "force_words_ids": [[3]], "watermarking_config": {"bias": 2.0}, "length_penalty": 2.0, "early_stopping": True,
    "cache_implementation": "paged", "custom_generate": "some/repository", "assistant_tokenizer": "any",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_draws_is_refused(name):
    model, ids = tiny(), batch()[0]
    if name == "use_mtp" and not hasattr(model.generation_config, name):
        pytest.skip("this transformers has no such option")
    before = model.generation_config.to_dict()
    with pytest.raises(ValueError, match=f"{name} is "):
        generate(model, ids, target=2.0, **ENDLESS, **{name: OTHERS[name]})
    if name in vars(model.generation_config):
        theirs = deepcopy(model.generation_config)
        setattr(theirs, name, OTHERS[name])
        with pytest.raises(ValueError, match=f"{name} is "):
            generate(model, ids, target=2.0, generation_config=theirs, **ENDLESS)
    assert model.generation_config.to_dict() == before


def test_whatever_else_draws_is_switched_off_in_the_model_s_configuration():
    """All at once; and what it says of penalties and end tokens holds."""
    model, ids = tiny(std=0.3), batch()[0]
    expected = {}
    for own in ({}, {"suppress_tokens": list(range(40))}):
        model.generation_config.update(**own)
        torch.manual_seed(0)
        expected[bool(own)] = generate(model, ids, target=3.0, **ENDLESS)
    assert (expected[True][:, ids.shape[1] :] >= 40).all() and not torch.equal(expected[True], expected[False])
    own = {
        "top_k": 2, "top_p": 0.3, "min_p": 0.5, "top_h": 0.2, "typical_p": 0.2, "epsilon_cutoff": 0.1, "num_beams": 3,
        "eta_cutoff": 0.1, "do_sample": True, "temperature": 0.1, "prompt_lookup_num_tokens": 3,
        "watermarking_config": WatermarkingConfig(bias=9.0),
    }  # fmt: skip
    model.generation_config.update(**own)
    before = model.generation_config.to_dict()
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, target=3.0, **ENDLESS), expected[True])
    assert model.generation_config.to_dict() == before
    with pytest.raises(ValueError, match="target is 0"):
        generate(model, ids, target=0, **ENDLESS)
    assert model.generation_config.to_dict() == before


def test_neutral_values_are_no_request():
    model, ids = tiny(), batch()[0]
    neutral = {"top_k": 0, "top_p": 1.0, "num_beams": 1, "do_sample": True, "assistant_model": None}
    neutral |= {name: False for name in ["use_mtp"] if hasattr(model.generation_config, name)}
    found = []
    for more in ({}, neutral, {"generation_config": deepcopy(model.generation_config)}):
        torch.manual_seed(0)
        found.append(generate(model, ids, target=2.0, **ENDLESS, **more))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "options",
    [
        *[{name: value} for name in ("target", "rate", "temperature") for value in (0.0, -1.0, float("nan"))],
        *[{name: value} for name in ("target", "rate", "temperature") for value in (float("inf"), "3", True, None)],
        *({"version": 3}, {"version": True}, {"version": "2"}, {"surprise": "some"}),
    ],
)
def test_options_outside_their_range_are_refused(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} (is )?{value!r}"):
        Mirostat(**options)
    assert Mirostat(np.float32(3)).target == 3  # a number all the same
    assert deepcopy(Mirostat()).mu.numel() == 0 and V == 97
