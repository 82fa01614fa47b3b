"""Path nucleus against its formulas written out path by path, and stochastic beams against all sequences there are."""

import itertools
import runpy
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_xent
from hf_xent.caches import StaircaseCache
from hf_xent.generation import paths
from hf_xent.generation.paths import export, generate, nucleus
from hf_xent.generation.voting import majority
from support.models import V, batch, tiny

ENDLESS = {"max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}  # no token ends a sequence
ALL = {"paths": 4, "num_return_sequences": 4, "return_dict_in_generate": True}


def test_the_nucleus_of_pairs_is_the_smallest_set_of_enough_mass():
    w = torch.tensor([0.5, 0.3, 0.2])
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
    joint = w[:, None] * p
    torch.testing.assert_close(joint, torch.tensor([[0.35, 0.1, 0.05], [0.03, 0.24, 0.03], [0.05, 0.05, 0.1]]))
    torch.testing.assert_close(joint.sum(0), torch.tensor([0.43, 0.39, 0.18]))
    keep = nucleus(joint.log()[None], 0.75)[0]
    assert keep.nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [2, 2]]
    assert joint[keep].sum().item() == pytest.approx(0.79)
    both = nucleus(torch.stack([joint, joint.T]).log(), 0.75)  # each prompt has its own
    assert torch.equal(both[0], keep) and torch.equal(both[1], keep.T)
    assert nucleus(joint.log()[None], 1e-9).sum() == 1 and nucleus(joint.log()[None], 1.0).all()


def padded_left(rows=3):
    ids = batch(rows)[0]
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


@pytest.mark.parametrize("more", [{}, {"temperature": 1.7, "repetition_penalty": 1.3}, {"top_p": 1.0}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_path_is_top_p_sampling_token_for_token(name, more):
    model, (ids, mask) = tiny(name, std=0.3), padded_left(8)
    options = {"attention_mask": mask, "max_new_tokens": 9, "eos_token_id": [2, *range(60, 80)], "pad_token_id": 0}
    options |= {"top_p": 0.8} | more
    torch.manual_seed(3)
    theirs = model.generate(ids, do_sample=True, top_k=0, **options)
    torch.manual_seed(3)
    ours = generate(model, ids, paths=1, **options)
    assert torch.equal(ours, theirs) and (ours[:, -1] == 0).any()  # some have ended before the last


def by_hand(model, ids, k, top_p, penalty, steps, ends):
    """The formulas for one prompt: whole forward passes, Python lists, and torch's draw without replacement."""
    live = [(ids.tolist(), 0.0, False)]
    start = len(ids)
    for _ in range(steps):
        scores = torch.tensor([logp / max(len(path) - start, 1) ** penalty for path, logp, _ in live]).double()
        pairs, mass = {}, torch.zeros(k * V)
        for j, (path, _, ended) in enumerate(live):
            p = model(torch.tensor([path])).logits[0, -1].detach().softmax(-1)
            for v, share in [(0, 1.0)] if ended else enumerate(p.tolist()):
                pairs[j * V + v] = scores.softmax(0)[j].item() * share
        total = 0.0
        for pair, share in sorted(pairs.items(), key=lambda item: -item[1]):
            if total < top_p:
                mass[pair] = share
            total += share
        found = [pair for pair in torch.multinomial(mass[None] / mass.sum(), k)[0].tolist() if mass[pair] > 0]
        follow = []
        for pair in found:
            path, logp, ended = live[pair // V]
            v = pair % V
            if not ended:
                logp += model(torch.tensor([path])).logits[0, -1].detach().log_softmax(-1)[v].item()
                path, ended = [*path, v], v in ends
            follow.append((path, logp, ended))
        live = follow
    weights = torch.tensor([logp / (len(path) - start) ** penalty for path, logp, _ in live]).softmax(0)
    return sorted(zip(weights.tolist(), live, strict=True), key=lambda item: -item[0])


@pytest.mark.parametrize(("top_p", "penalty", "std"), [(0.9, 0.0, 0.3), (0.6, 0.0, 0.6), (0.8, 1.0, 0.3)])
def test_paths_follow_the_formulas(top_p, penalty, std):
    model, ids, ends = tiny(std=std), batch(1, 5)[0], list(range(20, 40))
    torch.manual_seed(7)
    expected = by_hand(model, ids[0], 4, top_p, penalty, 5, ends)
    torch.manual_seed(7)
    found = generate(
        model, ids, top_p=top_p, length_penalty=penalty, max_new_tokens=5, eos_token_id=ends, pad_token_id=0, **ALL
    )
    for row, weight, logp, (share, (path, total, _)) in zip(*list(found.values())[:3], expected, strict=False):
        assert row.tolist() == path + [0] * (len(row) - len(path))
        assert weight.item() == pytest.approx(share, abs=1e-5) and logp.item() == pytest.approx(total, abs=1e-4)
    assert (found.weights[len(expected) :] == 0).all() and found.weights.sum().item() == pytest.approx(1)


def log_probs(model, sequences, start, pad=0, **more):
    """The sum over new tokens, up to the first padding, by one stock forward."""
    logits = model(sequences, **more).logits.detach().float()
    logp = logits[:, start - 1 : -1].log_softmax(-1).gather(-1, sequences[:, start:, None]).squeeze(-1)
    return logp.masked_fill(sequences[:, start:] == pad, 0.0).sum(-1)


@pytest.mark.parametrize("way", ["plain", "patched", "static", "no cache", "chunks", "padded", "staircase"])
def test_caches_follow_their_paths(way):
    """Log-probabilities are those of whole sequences, for every prompt of a batch, however they were computed."""
    model, ids = tiny(std=0.3), batch()[0]
    options = {
        "static": {"cache_implementation": "static", "disable_compile": True},
        "no cache": {"use_cache": False},
        "chunks": {"prefill_chunk_size": 4},
    }.get(way, {})
    ids, mask = padded_left() if way == "padded" else (ids, torch.ones_like(ids))
    if way == "staircase":  # blocks are exact, and reordered by their paths
        options["past_key_values"] = StaircaseCache(model.config, bits=16, residual_length=2)
    if way == "patched":
        hf_xent.patch(model)
    torch.manual_seed(1)
    found = generate(model, ids, attention_mask=mask, **ENDLESS, **ALL, **options, suppress_tokens=[0])
    hf_xent.unpatch(model)
    rows = found.sequences.view(3, 4, -1)
    assert torch.equal(rows[:, :, :11], ids[:, None].expand(-1, 4, -1)) and len({*map(tuple, rows[0].tolist())}) == 4
    full = torch.cat([mask.repeat_interleave(4, 0), torch.ones(12, 6, dtype=mask.dtype)], 1)
    more = {"attention_mask": full, "position_ids": (full.cumsum(-1) - 1).clamp(min=0)}
    logits = model(found.sequences, **more).logits.detach()[:, 10:-1]
    logits[..., 0] = -torch.inf
    stock = logits.log_softmax(-1).gather(-1, found.sequences[:, 11:, None]).sum((1, 2))
    torch.testing.assert_close(found.log_probs, stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights.view(3, 4), stock.view(3, 4).softmax(-1), rtol=1e-3, atol=1e-4)
    if way != "padded":
        torch.manual_seed(1)
        assert torch.equal(generate(model, ids, **ENDLESS, **ALL, suppress_tokens=[0]).sequences, found.sequences)


def test_bfloat16_and_an_encoder_with_a_decoder():
    model, ids = tiny(std=0.3, dtype=torch.bfloat16), batch()[0]
    found = generate(model, ids, **ENDLESS, **ALL)
    assert found.weights.dtype == torch.float32 and found.weights.view(3, 4).sum(-1).tolist() == pytest.approx([1] * 3)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, pad_token_id=0, decoder_start_token_id=0, **small)).eval()
    for p in t5.parameters():
        torch.nn.init.normal_(p, std=0.3)
    found = generate(t5, ids, **ENDLESS, **ALL, suppress_tokens=[0])
    logits = t5(ids.repeat_interleave(4, 0), decoder_input_ids=found.sequences).logits.detach()[:, :-1]
    logits[..., 0] = -torch.inf
    stock = logits.log_softmax(-1).gather(-1, found.sequences[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(found.log_probs, stock, rtol=1e-4, atol=1e-4)


def test_fewer_paths_live_where_the_nucleus_is_small():
    model, ids = tiny(std=0.3), batch()[0]
    found = generate(model, ids, top_p=1e-6, **ENDLESS, **ALL)
    greedy = model.generate(ids, do_sample=False, **ENDLESS)
    rows = found.sequences.view(3, 4, -1)
    assert torch.equal(rows[:, 0], greedy) and (rows[:, 1:, 11:] == 0).all()
    assert found.weights.tolist() == [1.0, 0.0, 0.0, 0.0] * 3
    assert torch.equal(generate(model, ids, top_p=1e-6, **ENDLESS), greedy)  # one row a prompt, as beams


class EndsAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 3 == 0


def test_rows_end_one_by_one_and_keep_their_weight():
    model, ids = tiny(std=0.3), batch()[0]
    found = generate(model, ids, **{**ENDLESS, "max_new_tokens": 9}, **ALL, top_p=1.0, stopping_criteria=[EndsAt()])
    new = found.sequences[:, 11:].tolist()
    ended = [row[: next((i + 1 for i, v in enumerate(row) if v % 3 == 0), 9)] for row in new]
    assert [row[: len(part)] for row, part in zip(new, ended, strict=True)] == ended
    assert all(set(row[len(part) :]) <= {0} for row, part in zip(new, ended, strict=True))
    assert len({*map(len, ended)}) > 1 and max(map(len, ended)) == len(new[0])
    for row, logp, part in zip(found.sequences, found.log_probs, ended, strict=True):
        whole = row[None, : 11 + len(part)]
        assert logp.item() == pytest.approx(log_probs(model, whole, 11, pad=-1).item(), abs=1e-4)


# --- stochastic beams

FEW, STEPS = 4, 3


@pytest.fixture(scope="module")
def counted():
    """A model of four tokens, of which the first ends, and every sequence of at most three with its probability."""
    model = tiny(std=0.5, vocab_size=FEW, eos_token_id=0, bos_token_id=1)
    p = {}
    for path in itertools.product(range(FEW), repeat=STEPS):
        cut = path[: path.index(0) + 1] if 0 in path else path
        whole = torch.tensor([[1, *cut]])
        p[cut + (0,) * (STEPS - len(cut))] = log_probs(model, whole, 1, pad=-1).exp().item()
    assert sum(p.values()) == pytest.approx(1, abs=1e-5)
    return model, p


def drawn(model, prompts, k, **options):
    torch.manual_seed(0)
    ids = torch.ones(prompts, 1, dtype=torch.long)
    options |= {"paths": k, "num_return_sequences": k, "return_dict_in_generate": True, "max_new_tokens": STEPS}
    found = generate(model, ids, attention_mask=ids, pad_token_id=0, eos_token_id=0, **options)
    rows = found.sequences[:, 1:]
    rows = torch.nn.functional.pad(rows, (0, STEPS - rows.shape[1]))
    return [[*map(tuple, part)] for part in rows.view(prompts, k, -1).tolist()], found


def test_stochastic_beams_draw_sequences_without_replacement(counted):
    """As two draws one after the other include them, p_i + sum_j p_j p_i / (1 - p_j); fresh noise does not."""
    model, p = counted
    exact = {i: p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in p if j != i) for i in p}
    worst = {}
    for stochastic in (True, False):
        rows, found = drawn(model, 4000, 2, stochastic_beam=stochastic, **({} if stochastic else {"top_p": 1.0}))
        alive = found.weights.view(-1, 2) > 0
        assert all(a != b for a, b in rows) and alive.all()
        share = {i: sum(i in pair for pair in rows) / 4000 for i in p}
        worst[stochastic] = max(abs(share[i] - exact[i]) / np.sqrt(exact[i] * (1 - exact[i]) / 4000) for i in p)
    assert worst[True] < 4 and worst[False] > 8


def test_sums_weighted_by_stochastic_beams_are_unbiased(counted):
    model, p = counted
    rows, found = drawn(model, 4000, 3, stochastic_beam=True)
    importance = found.log_importance.view(-1, 3).exp().double().numpy()
    for event in (lambda i: True, lambda i: i[1] == 2, lambda i: i[0] == 0, lambda i: sum(i) % 2 == 0):
        estimates = np.array([[event(i) for i in part] for part in rows]) * importance
        estimates = estimates.sum(-1)
        exact = sum(share for i, share in p.items() if event(i))
        assert abs(estimates.mean() - exact) < 4 * estimates.std() / 4000**0.5
    normalized = importance / importance.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.weights.view(-1, 3).numpy(), normalized, rtol=1e-4)


def test_stochastic_beams_of_everything_are_all_of_it(counted):
    """As many paths as there are sequences: nothing is dropped, and every weight is a probability."""
    model, p = counted
    k = len(p) + 5
    [rows], found = drawn(model, 1, k, stochastic_beam=True)
    assert {*rows[: len(p)]} == {*p} and (found.weights[len(p) :] == 0).all()
    for i, weight, logp in zip(rows[: len(p)], found.weights, found.log_importance, strict=False):
        assert weight.item() == pytest.approx(p[i], rel=1e-4) and logp.exp().item() == pytest.approx(p[i], rel=1e-4)


# --- around it


def test_a_vote_is_weighted():
    assert majority(["4", "5", "5"]) == "5" and majority(["4", "5", "5"], [0.6, 0.3, 0.1]) == "4"
    assert majority([None, "5", None], [0.9, 0.1, 0.0]) == "5" and majority([None, "5"], [1.0, 0.0]) is None
    assert majority([]) is None and majority([7, 3]) == 7
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"weights is .* for 2 answers"):
            majority(["4", "5"], weights)


def test_export_runs_as_custom_generate(tmp_path):
    model, (ids, _) = tiny(std=0.3), batch()
    model.save_pretrained(tmp_path)
    export(tmp_path)
    options = {**ENDLESS, **ALL, "top_p": 0.7}
    torch.manual_seed(5)
    ours = generate(model, ids, **options)
    torch.manual_seed(5)
    theirs = model.generate(ids, custom_generate=str(tmp_path), trust_remote_code=True, **options)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.weights, theirs.weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    torch.manual_seed(5)
    assert torch.equal(loaded.generate(inputs=ids, **options).sequences, ours.sequences)


def test_the_model_s_configuration_is_switched_off_and_left_alone():
    model, ids = tiny(std=0.3), batch()[0]
    torch.manual_seed(0)
    expected = generate(model, ids, **ENDLESS)
    model.generation_config.update(top_k=1, min_p=0.5, num_beams=3, do_sample=True, length_penalty=3.0)
    before = model.generation_config.to_dict()
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, **ENDLESS), expected)
    assert model.generation_config.to_dict() == before
    own = deepcopy(model.generation_config)
    own.update(top_k=7)
    with pytest.raises(ValueError, match="top_k is given, but Path nucleus alone"):
        generate(model, ids, generation_config=own, **ENDLESS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 0}, "paths is 0: choose a whole number"),
        ({"paths": 2.5}, r"paths is 2\.5"),
        ({"paths": True}, "paths is True"),
        ({"top_p": 0.0}, r"top_p is 0\.0: choose a number in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 0}, "temperature is 0: choose a positive number"),
        ({"length_penalty": -1.0}, r"length_penalty is -1\.0"),
        ({"stochastic_beam": 1}, "stochastic_beam is 1: choose True or False"),
        ({"stochastic_beam": True, "top_p": 0.9}, "top_p is given, but stochastic beams are of the whole model"),
        ({"stochastic_beam": True, "length_penalty": 1.0}, "length_penalty is given, but stochastic beams"),
        ({"paths": 2, "num_return_sequences": 3}, "num_return_sequences is 3, paths 2: choose at most 2"),
        ({"top_k": 5}, "top_k is given, but Path nucleus alone"),
        ({"num_beams": 4}, "num_beams is given"),
        ({"guidance_scale": 1.5}, "guidance_scale is given, but its cache"),
        ({"stop_strings": ["a"]}, "stop_strings is given, but .* pass a StopStringCriteria"),
        ({"streamer": object()}, "streamer is given, but only whole paths"),
        ({"output_scores": True}, "output_scores is given, but only whole paths"),
        ({"paths": 6}, "paths is 6 with 97 tokens: choose at most 5"),
        ({"pad_token_id": None, "eos_token_id": None}, "pad_token_id is None"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(paths, "MOST", 500)  # of 2^24
    model, ids = tiny(), batch(1, 2)[0]
    model.generation_config.update(pad_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match=message):
        generate(model, ids, **{**ENDLESS, **options})


# --- the example


def one_token_a_character():
    """A tokenizer under which all additions of two-digit numbers are equally long."""
    characters = {character: i for i, character in enumerate(["</s>", *"\n +=0123456789"])}
    tokenizer = Tokenizer(WordLevel(characters, unk_token="</s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split("", "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_additions_are_asked_once_and_voted_on(tmp_path, monkeypatch):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "additions.py"))
    names = example["main"].__globals__
    tokenizer, model = one_token_a_character(), tiny(std=0.3, vocab_size=15)
    monkeypatch.setattr("hf_xent.models.loading.load", lambda name, dtype: (model, tokenizer))
    arms = {f"{way}: {vote}" for way, (_, votes) in example["WAYS"].items() for vote in votes}
    options = {"additions": 5, "seeds": 2}
    monkeypatch.setitem(names, "BATCH", 2)
    drawn = {way: [*names["rows"](model, tokenizer, way, 0, [(23, 45), (67, 89), (10, 99)])] for way in example["WAYS"]}
    assert [len(answers) for rows in drawn.values() for answers, _ in rows] == [*[1] * 6, *[4] * 9]
    assert all(sum(weights) == pytest.approx(1) for answers, weights in drawn["path nucleus"])
    assert all(0 < sum(weights) < 1 for answers, weights in drawn["top-p"])
    found = example["main"](**options, output=tmp_path / "drawn")
    assert {*found} == arms and all({*rows} == {0, 1} for rows in found.values())
    assert all(0 <= row["accuracy"] <= row["any"] <= 1 for rows in found.values() for row in rows.values())
    asked = []

    def rows(lm, tokenizer, way, seed, pairs):
        asked.append((way, *pairs))
        return [([a + b, 7, 7, None], [0.6, 0.2, 0.1, 0.1]) for a, b in pairs]

    monkeypatch.setitem(names, "rows", rows)
    found = example["main"](**options, output=tmp_path / "made up")
    right = {arm for arm, seeds in found.items() if seeds[0]["accuracy"] == 1}
    assert right == {arm for arm in arms if arm.endswith(("weighted votes", "likeliest path"))}
    assert all(seeds[1]["any"] == 1 and seeds[1]["answers"] == 2 for seeds in found.values())
    assert len(asked) == 2 * len(example["WAYS"]) and len({pair for _, *pairs in asked for pair in pairs}) == 10
    assert example["main"](**options, output=tmp_path / "made up") == found and len(asked) == 2 * len(example["WAYS"])
