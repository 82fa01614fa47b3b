"""Biases of attention: against the formula written out, between backends, with caches, padding and packed texts."""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    MambaConfig,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

import hf_xent
from hf_xent.attention import (
    AttentionBias,
    Harmonic,
    Linear,
    Probabilistic,
    Window,
    alibi_slopes,
    attend,
    attending,
    harmonic_bias,
    harmonic_score_mod,
    probabilistic_mask,
    unattend,
)
from support.models import _LLAMA, CONFIGS, checkpointing, tiny

CONFIGS = CONFIGS | {
    "mistral sliding": lambda: MistralConfig(**_LLAMA, sliding_window=8),
    "gemma3 hybrid": lambda: CONFIGS["gemma3 softcap"]().__class__(
        **_LLAMA, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
MODELS = ("llama", "gpt2", "mistral sliding", "gemma3 hybrid")
SLOPES = (1.5, 0.7, 0.3, 0.0)
DRAWN = Probabilistic(4, rate=0.4, unbiased=True, per_head=True, per_layer=True, seed=3)
BIASES = {
    "harmonic": Harmonic(SLOPES), "ALiBi": Linear(), "drawn": Probabilistic(4, "inverse"), "drawn by head": DRAWN,
    "window": Window(5, first=2),
}  # fmt: skip
IDS = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(0))


def made(name="llama", backend="sdpa", **changes):
    """A tiny model under an attention of transformers."""
    if name in MODELS[2:]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    else:
        model = tiny(name, **changes)
    model.set_attn_implementation(backend)
    return model


@torch.no_grad()
def logits(model, bias=None, ids=IDS, **inputs):
    if bias is None:
        return model(ids, **inputs).logits
    with attending(model, bias):
        return model(ids, **inputs).logits


def added(bias, layer, heads, length):
    """The formula, pair by pair: [H, T, T]."""
    table = torch.full((heads, length, length), -torch.inf)
    draw = (
        bias.drawn(-(-length // bias.block), bias.planes(heads) * (2 if bias.per_layer else 1))
        if hasattr(bias, "drawn")
        else None
    )
    for h in range(heads):
        for i in range(length):
            for j in range(i + 1):
                if draw is not None:
                    plane = (layer * bias.planes(heads) if bias.per_layer else 0) + (h if bias.per_head else 0)
                    table[h, i, j] = draw[plane, i // bias.block, j // bias.block]
                elif isinstance(bias, Window):
                    table[h, i, j] = 0.0 if i - j < bias.size or j < bias.first else -torch.inf
                else:
                    slope = alibi_slopes(heads)[h] if bias.slopes is None else bias.slopes[h]
                    far = sum(1 / t for t in range(1, i - j + 1)) if isinstance(bias, Harmonic) else i - j
                    table[h, i, j] = -slope * far
    return table


def turned(x, cos, sin):
    """Rotary positions."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def reference(module, hidden, bias, positions, window):
    """What an attention layer has to return for these hidden states."""
    batch, length, _ = hidden.shape
    if hasattr(module, "c_attn"):
        heads = module.num_heads
        q, k, v = (x.view(batch, length, heads, -1).transpose(1, 2) for x in module.c_attn(hidden).chunk(3, -1))
        scale, out = q.shape[-1] ** -0.5, module.c_proj
    else:
        q, k, v = (
            getattr(module, f"{name}_proj")(hidden).view(batch, length, -1, module.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = turned(q, *positions), turned(k, *positions)
        heads, scale, out = q.shape[1], module.scaling, module.o_proj
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale + added(bias, module.layer_idx, heads, length)
    ids = torch.arange(length)
    if window:
        scores = scores.masked_fill(ids[:, None] - ids >= window, -torch.inf)
    return out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", MODELS)
def test_layers_compute_the_formula(name, bias):
    model, seen = made(name), []
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            module.register_forward_hook(
                lambda module, args, kwargs, output: seen.append((module, args, kwargs, output[0])), with_kwargs=True
            )
    logits(model, BIASES[bias])
    assert len(seen) == 2
    for module, args, kwargs, output in seen:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        window = getattr(module, "sliding_window", None) or (8 if name == "mistral sliding" else None)
        with torch.no_grad():
            expected = reference(module, hidden, BIASES[bias], kwargs.get("position_embeddings"), window)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_harmonic_numbers_and_the_bias_of_the_last_queries():
    found = -harmonic_bias(1, 6, [1.0, 0.5])[:, 0].flip(-1)
    torch.testing.assert_close(found[0], torch.tensor([0, 1, 1.5, 1.833333, 2.083333, 2.283333]))
    torch.testing.assert_close(found[1], found[0] / 2)
    assert torch.equal(harmonic_bias(2, 5, SLOPES), harmonic_bias(5, 5, SLOPES)[:, 3:])
    with pytest.raises(ValueError, match="length_q is 3, more than length_k, 2"):
        harmonic_bias(3, 2, SLOPES)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 9, 12, 17])
def test_slopes_are_those_of_transformers_alibi(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "bias", [Harmonic(0), Linear([0.0] * 4), Probabilistic(4, rate=1.0, unbiased=True), Window(21), Window(1, first=21)]
)
def test_a_bias_of_nothing_is_the_model_itself(bias, backend):
    """A mask of ones makes the model take a mask too: the same kernel, so the same bits."""
    model = made(backend=backend)
    ones = torch.ones(2, 21)
    ones[1, 0] = 0
    assert torch.equal(logits(model, bias, attention_mask=ones)[0], logits(model, attention_mask=ones)[0])
    torch.testing.assert_close(logits(model, bias), logits(model), rtol=1e-4, atol=1e-4)


FLEX = ("flex_attention",) if "position_bias" in signature(flex_attention_forward).parameters else ()  # 5.24 and later


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ["llama", "gemma2 softcap", "gemma3 hybrid"])
def test_backends_agree(name, bias):
    model = made(name, "eager")
    expected = logits(model, BIASES[bias])
    assert not torch.allclose(expected, logits(model), atol=1e-2)
    for backend in ("sdpa", *FLEX):
        if (name, backend) == ("gemma2 softcap", "sdpa"):
            continue  # transformers' sdpa refuses models that cap scores
        model.set_attn_implementation(backend)
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: it is not compiled; transformers passes a deprecated flag
            torch.testing.assert_close(logits(model, BIASES[bias]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not FLEX, reason="this transformers passes no bias to FlexAttention")
@pytest.mark.parametrize("bias", ["drawn", "drawn by head"])  # by a block mask, and by a score_mod
def test_compiled_flex_attention_agrees(bias):
    model = made(backend="eager")
    expected = logits(model, BIASES[bias])
    model.set_attn_implementation("flex_attention")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, while it compiles; transformers passes a deprecated flag
        found = logits(model, BIASES[bias])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_score_mod_for_flex_attention():
    q, k, v = torch.randn(3, 1, 4, 9, 8).unbind()
    expected = torch.softmax(q[:, :, 5:] @ k.mT / 8**0.5 + harmonic_bias(4, 9, SLOPES), -1) @ v
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = flex_attention(q[:, :, 5:], k, v, score_mod=harmonic_score_mod(SLOPES, 9, offset=5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", MODELS)
def test_a_later_token_changes_nothing_earlier(name, bias):
    model, changed = made(name), IDS.clone()
    changed[:, 13:] = 5
    before, after = logits(model, BIASES[bias]), logits(model, BIASES[bias], changed)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 13:], after[:, 13:], atol=1e-2)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", MODELS)
def test_steps_with_a_cache_are_one_forward(name, bias):
    model = made(name)
    expected = logits(model, BIASES[bias])
    with torch.no_grad(), attending(model, BIASES[bias]):
        out = model(IDS[:, :7], use_cache=True)
        found = [out.logits]
        for ids in IDS[:, 7:].split([3, 1, 1, 5, 1, 1, 1, 1], 1):
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ["llama", "gemma3 hybrid"])
def test_generation_with_padding_and_either_cache(name, bias):
    """Greedy tokens with a growing cache, a static one, padding on the left, and no cache at all."""
    model = made(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDS[:, :9]), 1)
    with attending(model, BIASES[bias]):
        expected = IDS[:, :9]
        for _ in range(6):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
        for cache in ("dynamic", "static"):
            found = model.generate(IDS[:, :9], cache_implementation=cache, disable_compile=True, **options)
            assert torch.equal(found, expected), cache
        found = model.generate(padded, attention_mask=(padded > 0).long(), **options)
    assert torch.equal(found[:, 3:], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", [Linear(50.0), DRAWN, Window(3)])
def test_padding_is_left_out_and_its_rows_are_finite(bias, backend, dtype):
    model = made(backend=backend).to(dtype)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :6], mask[1, 17:] = 0, 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, bias, attention_mask=mask, position_ids=places)
    assert found.isfinite().all()
    if dtype == torch.float32:
        alone = [logits(model, bias, IDS[:1, 6:]), logits(model, bias, IDS[1:, :17])]
        torch.testing.assert_close(found[0, 6:], alone[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1, :17], alone[1][0], rtol=1e-4, atol=1e-4)


def test_packed_texts_do_not_see_each_other():
    model = made()
    places = torch.cat((torch.arange(9), torch.arange(12)))[None].expand(2, -1)
    found = logits(model, Harmonic(SLOPES), position_ids=places, use_cache=False)
    torch.testing.assert_close(found[:, :9], logits(model, Harmonic(SLOPES), IDS[:, :9]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 9:], logits(model, Harmonic(SLOPES), IDS[:, 9:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", BIASES)
def test_training_has_the_same_gradients_streamed_and_recomputed(bias):
    """Plain, patched, and with gradient checkpointing; after the first step the loss under the bias is lower."""

    def gradients(model):
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    model = attend(made().train(), BIASES[bias])
    loss, expected = gradients(model)
    ids = IDS[:, 1:, None]
    dense = -logits(made(), BIASES[bias])[:, :-1].log_softmax(-1).gather(-1, ids).mean()
    torch.testing.assert_close(loss, dense, rtol=1e-4, atol=1e-4)
    for other in (hf_xent.patch(model), checkpointing(model), checkpointing(hf_xent.unpatch(model), reentrant=True)):
        torch.testing.assert_close(gradients(other), (loss, expected), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-3 * expected[name]
        assert model(IDS, labels=IDS).loss < loss


def test_kept_sums_are_unbiased_and_shares_are_as_expected():
    """1e5 draws of every pair's exp(score): the mean is the dense sum within four standard errors of the formula."""
    scores = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).exp().tril()
    draws, total = 100_000, scores.sum(-1)
    for fall in ("geometric", "inverse"):
        bias = Probabilistic(4, fall, rate=0.4, unbiased=True, seed=5)
        pi = bias.probabilities(6)
        of_blocks = scores.view(24, 6, 4).sum(-1)  # [i, J]
        kept = bias.drawn(6, draws).double().exp()[:, torch.arange(24) // 4]  # [draws, i, J]
        mean = (kept * of_blocks).sum(-1).mean(0)
        probability = pi[(torch.arange(24)[:, None] // 4 - torch.arange(6)).clamp(min=0)]
        error = (of_blocks**2 * (1 / probability - 1)).sum(-1).div(draws).sqrt()
        assert ((mean - total).abs() <= 4 * error + 1e-5 * total).all()
        assert (error[:8] == 0).all() and (error[8:] > 0).all(), "this block and the one before are always kept"
        for plain in (Probabilistic(4, fall, rate=0.4, seed=5), Probabilistic(4, fall, rate=0.4, first=True)):
            kept = (probabilistic_mask(24, 2000, bias=plain) == 0).double().mean(0)
            assert float(kept.sum()) / (24 * 25 / 2) == pytest.approx(plain.share(24), abs=0.01)
            assert bool((kept[:, :4].tril() == torch.ones(24, 4).tril()).all()) == plain.first


def test_draws_depend_on_the_seed_alone_not_on_the_length():
    bias = Probabilistic(4, seed=1)
    assert torch.equal(probabilistic_mask(40, 3, bias=bias)[:, :17, :17], probabilistic_mask(17, 3, bias=bias))
    assert not torch.equal(bias.drawn(10, 1), Probabilistic(4, seed=2).drawn(10, 1))
    planes = DRAWN.drawn(10, 8)
    assert all(not torch.equal(planes[0], other) for other in planes[1:])


def test_the_share_of_a_window():
    for window in (Window(5), Window(5, first=3), Window(40), Window(1)):
        ids = torch.arange(30)
        kept = (window.dense(ids, ids, 1) == 0).tril()
        assert window.share(30) == pytest.approx(float(kept.sum()) / (30 * 31 / 2))


def test_the_model_is_as_before_after_the_context_and_after_errors():
    model, other = made(), made()
    before, names = logits(model), (set(AttentionInterface()), set(AttentionMaskInterface()))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(KeyError, match="from inside"), attending(model, Window(3)):
        assert torch.equal(logits(other), before), "another model is left alone"
        inner = logits(model, Harmonic(SLOPES))
        torch.testing.assert_close(model(IDS).logits, logits(other, Window(3)), rtol=1e-5, atol=1e-5)
        raise KeyError("from inside")
    assert torch.equal(logits(model), before) and torch.equal(inner, logits(other, Harmonic(SLOPES)))
    attend(attend(model, Window(3)), Linear())
    assert torch.equal(logits(model), logits(other, Linear())), "the later one replaces the earlier"
    unattend(unattend(model))
    assert torch.equal(logits(model), before) and model.config._attn_implementation == "sdpa"
    assert (set(AttentionInterface()), set(AttentionMaskInterface())) == names
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("hf_xent" in key for key in model.__dict__)


def test_a_saved_model_does_not_know_of_the_bias(tmp_path):
    model = attend(made(), Window(3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(unattend(model)), rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Mine(AttentionBias):
    """A bias of a user: even distances only."""

    drops = True

    def planes(self, heads):
        return 1

    def entries(self, length, planes, device="cpu"):
        return lambda plane, queries, keys: torch.where((queries - keys) % 2 == 0, 0.0, -torch.inf)


def test_a_bias_of_ones_own():
    model, changed = made(num_hidden_layers=1), IDS.clone()
    changed[:, -2] = 5
    assert torch.equal(logits(model, Mine())[:, -1], logits(model, Mine(), changed)[:, -1])


REFUSED = {
    "mamba": (lambda: MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1), "model is a MambaFor.* no bias"),
    "bloom": (lambda: BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2), "model is a BloomFor.* no bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_such_attention_are_refused(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        attend(AutoModelForCausalLM.from_config(config()), Harmonic())


def test_encoders_are_refused():
    sizes = {"vocab_size": 97, "num_layers": 1, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16}
    with pytest.raises(ValueError, match="model is a T5ForConditionalGeneration"):
        attend(T5ForConditionalGeneration(T5Config(**sizes)), Harmonic())
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=97, is_decoder=False, **shape)).eval()
    with pytest.raises(ValueError, match="attends without a causal mask"):
        logits(bert, Harmonic())


def test_what_cannot_take_effect_is_refused():
    model = made()
    with pytest.raises(ValueError, match="slopes has 3 numbers, but the model has 4 heads"):
        attend(model, Harmonic([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="bias is 'harmonic': give a Harmonic"):
        attend(model, "harmonic")
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 1, 21, 21\)"):
        logits(model, Harmonic(), attention_mask=torch.zeros(2, 1, 21, 21))
    with attending(model, Harmonic()):
        with pytest.raises(ValueError, match="LlamaAttention attends without a causal mask"):
            model.model(IDS, attention_mask=torch.zeros(2, 1, 21, 21))
        model(IDS)
        with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 1, 21, 21\)"):
            model.model(IDS, attention_mask=torch.zeros(2, 1, 21, 21))
        with pytest.raises(ValueError, match="a model with a bias cannot be copied: call unattend"):
            deepcopy(model)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="attn_implementation is 'eager' since the bias was set"):
            model(IDS)
        expected = logits(made(backend="eager"), Window(3))
        assert torch.equal(logits(attend(model, Window(3))), expected), "on the attention that was set since"
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation is 'flash_attention_2', which takes no bias"):
        attend(model, Harmonic())


@pytest.mark.parametrize(
    ("bias", "options", "message"),
    [
        (Harmonic, {"slopes": -1.0}, "slopes is -1.0"),
        (Linear, {"slopes": "steep"}, "slopes is 'steep'"),
        (Linear, {"slopes": [0.0, float("inf")]}, "slopes is .*inf"),
        (Window, {"size": 0}, "size is 0"),
        (Window, {"size": 2, "first": -1}, "first is -1"),
        (Probabilistic, {"block": 0}, "block is 0"),
        (Probabilistic, {"fall": "linear"}, "fall is 'linear'"),
        (Probabilistic, {"rate": 0.0}, "rate is 0.0"),
        (Probabilistic, {"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(bias, options, message):
    with pytest.raises(ValueError, match=message):
        bias(**options)
