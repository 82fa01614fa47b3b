"""Analysis of LN-free models: attributions against brute-force patching, the rest against cases worked by hand."""

import json

import numpy as np
import peft
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hf_xent
from hf_xent import ln_free
from hf_xent.cli import app
from hf_xent.ln_free.analysis import analyze
from hf_xent.ln_free.neurons import confidence_neurons
from hf_xent.metrics.calibration import BINS, binned, calibration_error
from support.models import V, tiny, tiny_tokenizer


def blocks(rows=5, length=9):
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(3))


def free(name="gpt2", std=0.08):
    """A tiny model whose norms were all removed."""
    model = ln_free.wrap(tiny(name, std=std))
    ln_free.calibrate(model, [{"input_ids": blocks()}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    return model


@torch.no_grad()
def gpt2_head_outputs(model, ids):
    """What every head adds to the residual stream at the last predicting position, [layers, heads, B, D]: by hand."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
        inputs = []
        hooks = [b.attn.c_attn.register_forward_pre_hook(lambda _, a: inputs.append(a[0])) for b in model.transformer.h]
        model(ids)
    for hook in hooks:
        hook.remove()
    found = []
    for block, x, attention in zip(model.transformer.h, inputs, weights, strict=True):
        count = attention.shape[1]
        values = (x @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)[2]
        values = values.unflatten(-1, (count, -1)).transpose(1, 2)  # [B, H, T, width]
        out = block.attn.c_proj.weight.unflatten(0, (count, -1))  # [H, width, D]
        found.append(torch.einsum("bht,bhtw,hwd->hbd", attention[:, :, -2], values, out))
    return torch.stack(found)


def patched_logit(model, ids, part):
    """The last label's logit with `part` [B, D] taken out of the residual stream before the final norm: a whole run."""

    def subtract(_, args):
        x = args[0].clone()
        x[:, -2] -= part
        return (x,)

    hook = model.transformer.ln_f.register_forward_pre_hook(subtract)
    with torch.no_grad():
        logits = model(ids).logits[:, -2]
    hook.remove()
    return logits.gather(1, ids[:, -1:]).squeeze(1)


@torch.no_grad()
def brute_force_nmae(model, ids):
    parts = gpt2_head_outputs(model, ids)
    seen = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -2]))
    whole = patched_logit(model, ids, 0.0)
    hook.remove()
    norm, row = model.transformer.ln_f, model.lm_head.weight[ids[:, -1]]
    sigma = (seen[0].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    rows = []
    for layer in parts:
        rows.append([])
        for part in layer:
            direct = whole - patched_logit(model, ids, part)
            attributed = ((part - part.mean(-1, keepdim=True)) / sigma * norm.weight * row).sum(-1)
            rows[-1].append(float((attributed - direct).abs().mean() / direct.abs().mean()))
    return rows


def test_attribution_is_what_patching_every_head_finds():
    model, ids = tiny("gpt2"), blocks()
    expected = torch.tensor(brute_force_nmae(model, ids))
    found = torch.tensor(analyze(model, ids, batch_size=2).nmae)
    assert found.shape == (2, 4) and (expected > 0.01).all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_attribution_is_exact_without_norms(name):
    ids = blocks()
    before = analyze(tiny(name, std=0.08), ids)
    assert before.mean_nmae > 0.01
    removed = analyze(free(name), ids)
    assert removed.mean_nmae < 1e-4 and removed.loss == pytest.approx(removed.loss)
    assert len(removed.nmae) == 2 and all(len(layer) == 4 for layer in removed.nmae)


def test_one_removed_norm_is_not_enough():
    """Values' and queries' divisors do not matter to the last step, the final norm's does."""
    model, ids = free(), blocks()
    ln_free.restore(model, "final")
    assert analyze(model, ids).mean_nmae > 0.01


def test_losses_are_those_of_dense_logits():
    model, ids = tiny("llama"), blocks(6, 11)
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -logp.gather(-1, ids[:, 1:, None]).flatten()
    confidence, top = logp.exp().max(-1)
    right = (top == ids[:, 1:]).flatten()
    found = analyze(model, ids, batch_size=4)
    for name, value in {
        "loss": nll.mean(),
        "median": nll.median() if len(nll) % 2 else nll.quantile(0.5),
        "p95": nll.quantile(0.95),
        "p99": nll.quantile(0.99),
        "entropy": -(logp.exp() * logp).sum(-1).mean(),
        "accuracy": right.double().mean(),
    }.items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-4), name
    error = 0.0
    for low in range(BINS):
        inside = (confidence.flatten() > low / BINS) & (confidence.flatten() <= (low + 1) / BINS)
        if inside.any():
            gap = right[inside].double().mean() - confidence.flatten()[inside].mean()
            error += float(inside.double().mean() * gap.abs())
    assert found.ece == pytest.approx(error, abs=1e-5)


def test_calibration_error_by_hand():
    """Two bins of 15: 0.90 and 0.92 with one right of two, 0.10 with none: (2 |0.5 - 0.91| + 1 |0 - 0.1|) / 3."""
    bins = binned(torch.tensor([0.90, 0.92, 0.10]), torch.tensor([True, False, False]))
    assert bins.sum(1).tolist() == pytest.approx([3, 1, 1.92])
    assert calibration_error(bins) == pytest.approx((2 * abs(0.5 - 0.91) + 0.1) / 3)
    assert calibration_error(binned(torch.ones(4), torch.ones(4, dtype=torch.bool))) == 0


def test_confidence_neurons_by_hand():
    """Two tokens at (1, 0) and (-1, 0), one at (0, 1): a neuron along the first axis moves logits against each other.

    Variances of its cosines 1, -1, 0: 2/3; along the second 0, 0, 1: 2/9. Equal lengths: the second scores more.
    """
    head = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    projection = nn.Linear(3, 2)
    projection.weight.data = torch.tensor([[1.0, 0.0, 4.0], [0.0, 1.0, 0.0]])  # neurons (1, 0), (0, 1), (4, 0)
    assert confidence_neurons(projection, head, 3).tolist() == [2, 1, 0]  # 4 / (2/3), 1 / (2/9), 1 / (2/3)


def test_heads_and_neurons_without_weights_are_no_nan():
    """Pruned ones: a head whose effect is nothing has no error, a neuron that writes nothing no score."""
    model, ids = tiny("gpt2"), blocks()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:8] = 0.0  # the first head's
        model.transformer.h[-1].mlp.c_proj.weight[:100] = 0.0
    found = analyze(model, ids, neurons=3)
    assert found.nmae[1][0] == 0 and min(found.nmae[1][1:]) > 0 and min(found.neurons) >= 100
    assert all(torch.tensor(value).isfinite().all() for value in found.as_dict().values())
    for options, match in (
        ({"neurons": 1000}, "neurons is 1000, but the last MLP has 128"),
        ({"batch_size": 0}, "batch_size is 0 and neurons 3"),
        ({"neurons": -1}, "batch_size is 8 and neurons -1"),
    ):
        with pytest.raises(ValueError, match=match):
            analyze(model, ids, **options)
    with pytest.raises(ValueError, match=r"blocks is \[0, 9\]"):
        analyze(model, ids[:0])
    with pytest.raises(ValueError, match="tokens is 0"):
        ln_free.verify(model, tokens=0)


def test_ablated_neurons_are_held_at_their_means():
    model, ids = tiny("gpt2"), blocks()
    found = analyze(model, ids, neurons=2)
    projection = model.transformer.h[-1].mlp.c_proj
    seen = []
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        whole = model(ids, labels=ids).loss
    hook.remove()
    held = seen[0].clone()
    held[..., list(found.neurons)] = held[..., list(found.neurons)].mean((0, 1))
    hook = projection.register_forward_pre_hook(lambda _, args: (held,))
    with torch.no_grad():
        ablated = model(ids, labels=ids).loss
    hook.remove()
    assert found.neuron_loss == pytest.approx(float(ablated / whole - 1), abs=1e-5)


def test_sinks_and_first_norms_are_what_the_model_returns():
    model, ids = tiny("gpt2", std=0.5), blocks()
    found = analyze(model, ids, batch_size=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    to_first = torch.stack([a[:, :, 1:, 0].mean((0, 2)) for a in out.attentions])
    assert found.sink_rate == float((to_first > 0.3).float().mean()) and 0 < found.sink_rate < 1
    between = out.hidden_states[1]  # the last one is after the final norm
    ratio = between[:, 0].norm(dim=-1).mean() / between[:, 1:].norm(dim=-1).mean()
    assert found.first_norm >= float(ratio) * (1 - 1e-5)


def test_sequences_that_overflow_are_counted_and_left_out():
    """A token as large as gated MLPs make it where nothing normalizes."""
    model, ids = free("llama"), blocks()
    usual = analyze(model, ids[[0, 1, 3, 4]])  # no 0 in it
    assert usual.exploded == 0.0
    ids[2, 4] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e38
    found = analyze(model, ids)
    assert found.exploded == pytest.approx(0.2)
    ours, theirs = found.as_dict(), usual.as_dict()
    assert all(ours[name] == pytest.approx(theirs[name], rel=1e-4) for name in ("loss", "p99", "ece", "entropy"))
    with pytest.raises(ValueError, match="overflows in each of 1 sequences"):
        analyze(model, ids[2:3])


def test_analysis_leaves_the_model_as_it_was():
    model = hf_xent.patch(tiny("gpt2").train(), "emo")
    model.set_attn_implementation("sdpa")
    analyze(model, blocks())  # attention hooks that transformers itself leaves on a model are there from now on
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    analyze(model, blocks())
    assert model.training and model.config._attn_implementation == "sdpa" and hf_xent.patching.patch_state(model)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ValueError, match=r"blocks is \[4\]"):
        analyze(model, blocks()[0, :4])


def test_analysis_of_an_adapted_model_keeps_the_users_patch():
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(tiny("gpt2"), config)
    found = analyze(model, blocks())
    state = hf_xent.patching.patch_state(hf_xent.patch(model, "focal"))
    assert analyze(model, blocks()) == found
    assert (
        hf_xent.patching.patch_state(model) is state and state.streamed == 0 and model.loss_function.loss.gamma == 2.0
    )


@pytest.mark.parametrize("targets", [["o_proj"], ["down_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_analysis_of_an_adapted_model_is_that_of_the_merged_one(targets):
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama", std=0.1), config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = analyze(model, blocks()).as_dict()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for name, value in analyze(model.merge_and_unload(), blocks()).as_dict().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-2, atol=1e-6, err_msg=name)


def test_report_of_every_form(tmp_path):
    """Removable, eps trick and true have the same numbers; the table, the card section and the plots are there."""
    ids, model = blocks(), free()
    analyses = {
        "original": analyze(tiny("gpt2", std=0.08), ids),
        "removable": analyze(model, ids),
        "eps trick": analyze(ln_free.to_eps_trick(model), ids),
        "true": analyze(ln_free.to_true(model), ids),
    }
    for name in ("eps trick", "true"):
        assert analyses[name].mean_nmae < 1e-3 < analyses["original"].mean_nmae
        assert analyses[name].loss == pytest.approx(analyses["removable"].loss, abs=1e-4)
    page = ln_free.Report(analyses).save(tmp_path)
    text, found = page.read_text(), json.loads((tmp_path / "report.json").read_text())
    assert f"| loss, mean (nats per token) | {analyses['original'].loss:.4f} |" in text and "report.png" in text
    assert found["true"]["mean_nmae"] == analyses["true"].mean_nmae
    heads = [100 * value for layer in analyses["original"].nmae for value in layer]
    assert f"least to largest head | {min(heads):.2g} to {max(heads):.2g} % |" in text
    curves = ln_free.draw_curves({"a": [(1, 2.0), (2, 1.0)]}, [(1, "mlp.0"), (2, "final")], tmp_path / "curves.png")
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in (tmp_path / "report.png", curves))


def test_command_reports(tmp_path):
    for folder, made in (("free", ln_free.to_eps_trick(free())), ("original", tiny("gpt2", std=0.08))):
        made.save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    command = ["ln-free", "report", str(tmp_path / "free"), "--original", str(tmp_path / "original"), "--text"]
    command += [str(tmp_path / "text.txt"), "--length", "16", "--sequences", "4", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["original", "LN-free"] and found["LN-free"]["mean_nmae"] < 1e-3
    assert (tmp_path / "out" / "report.md").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "attention-sink rate" in done.stdout
