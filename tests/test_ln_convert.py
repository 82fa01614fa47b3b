"""LN-free checkpoints: folding against the formulas, both ways round, in stock classes and out of a folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner

from hf_xent import cli, ln_free
from support.models import CONFIGS, batch, tiny, tiny_tokenizer

NAMES = ("gpt2", "llama", "llama tied", "neox", "opt", "cohere scale")
WITH_EPS = [name for name in NAMES if name != "opt"]


def removed(name, std=0.2):
    """A model whose norms were removed after it saw a batch."""
    model = ln_free.wrap(tiny(name, std))
    ln_free.calibrate(model, [{"input_ids": batch()[0]}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=batch()[0] if ids is None else ids).logits


def apart(a, b):
    return (logits(a) - logits(b)).abs().max().item()


@pytest.mark.parametrize("name", WITH_EPS)
def test_a_stock_class_loads_the_eps_trick(tmp_path, name):
    model = removed(name)
    trick = ln_free.to_eps_trick(model)
    assert type(trick) is type(model) and apart(model, trick) < 1e-4
    trick.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert apart(model, loaded) < 1e-4 and ln_free.is_ln_free(loaded)
    assert ln_free.form_of(loaded) == "eps trick"


def test_the_format_of_the_released_models(tmp_path):
    """weight 1e6 / sigma times what it was, beta as it was, eps 1e12 in modules and configuration, tied as it was."""
    model = removed("gpt2")
    ln_free.to_eps_trick(model).save_pretrained(tmp_path)
    found, sigma = GPT2LMHeadModel.from_pretrained(tmp_path), {s.norm: s.sigma for s in ln_free.sites(model)}
    assert json.loads((tmp_path / "config.json").read_text())["layer_norm_epsilon"] == 1e12
    assert found.config.architectures == ["GPT2LMHeadModel"] and found.lm_head.weight is found.transformer.wte.weight
    assert sigma.keys() == {n for n, m in found.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    for name, value in sigma.items():
        before, after = model.get_submodule(name), found.get_submodule(name)
        assert after.eps == 1e12
        torch.testing.assert_close(after.weight, before.weight * 1e6 / value)
        assert torch.equal(after.bias, before.bias)
    same = {n for n, p in model.named_parameters() if torch.equal(p, found.get_parameter(n))}
    assert {n for n, _ in model.named_parameters()} - same == {f"{name}.weight" for name in sigma}


@pytest.mark.parametrize("name", NAMES)
def test_true_models_compute_the_same_without_norms(name):
    model = removed(name)
    true = ln_free.to_true(model)
    assert apart(model, true) < 1e-4
    assert not [m for m in true.modules() if "Norm" in type(m).__name__]
    assert ln_free.is_ln_free(true) and ln_free.form_of(true) == "true"
    assert true.get_output_embeddings().weight is not true.get_input_embeddings().weight


def test_folding_by_hand():
    """The formulas on one reader of GPT-2, and on its head, which gets a bias."""
    model = removed("gpt2")
    true, block = ln_free.to_true(model), model.transformer.h[1]
    center = torch.eye(32) - torch.ones(32, 32) / 32
    for norm, before, after in (
        (block.ln_2, block.mlp.c_fc.weight.T, true.transformer.h[1].mlp.c_fc.weight.T),
        (model.transformer.ln_f, model.lm_head.weight, true.lm_head.weight),
    ):
        torch.testing.assert_close(after, before @ torch.diag(norm.weight / norm.sigma) @ center)
    beta, fc = block.ln_2.bias, block.mlp.c_fc
    torch.testing.assert_close(true.transformer.h[1].mlp.c_fc.bias, fc.bias + beta @ fc.weight)
    torch.testing.assert_close(true.lm_head.bias, model.lm_head.weight @ model.transformer.ln_f.bias)


@pytest.mark.parametrize("name", WITH_EPS)
def test_from_the_trick_to_true_and_back(name):
    trick = ln_free.to_eps_trick(removed(name))
    true = ln_free.to_true(trick)
    back = ln_free.to_eps_trick(true)
    assert type(back) is type(trick) and not hasattr(back.config, "ln_free")
    assert apart(trick, true) < 1e-4 and apart(trick, back) < 1e-4 and ln_free.is_ln_free(back)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_true_folder_loads_with_its_own_code(tmp_path, name):
    true = ln_free.to_true(removed(name))
    true.save_pretrained(tmp_path / "once")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
    assert type(loaded).__name__ == "LNFree" + type(true).__mro__[2].__name__
    assert apart(true, loaded) < 1e-5 and ln_free.is_ln_free(loaded)
    loaded.save_pretrained(tmp_path / "twice")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    assert apart(true, again) < 1e-5
    back = ln_free.to_eps_trick(again) if name != "opt" else again
    assert apart(true, back) < 1e-4


def test_load_takes_every_form(tmp_path):
    """Also half-removed checkpoints, and true ones without running their code."""
    model = removed("gpt2")
    ln_free.restore(model, "v.1")
    forms = {"removable": model, "true": ln_free.to_true(removed("gpt2")), "normalized": tiny("gpt2")}
    forms["eps trick"] = ln_free.to_eps_trick(removed("gpt2"))
    for form, found in forms.items():
        tiny_tokenizer().save_pretrained(tmp_path / form)
        found.save_pretrained(tmp_path / form)
        loaded, _ = ln_free.load(str(tmp_path / form))
        assert ln_free.form_of(loaded) == form and apart(found, loaded) < 1e-5
        assert ln_free.is_ln_free(loaded) == (form in ("true", "eps trick"))
    loaded, _ = ln_free.load(str(tmp_path / "removable"))
    assert ln_free.sites(loaded) == ln_free.sites(model)


def test_load_from_the_cache_of_the_hub(tmp_path):
    """As downloaded: a removable and a true model by name, in a process that cannot download."""
    for name, model in (("removable", removed("gpt2")), ("true", ln_free.to_true(removed("gpt2")))):
        folder = tmp_path / "hub" / f"models--us--{name}"
        for saved in (model, tiny_tokenizer()):
            saved.save_pretrained(folder / "snapshots" / "abc")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
    code = "for n in ('removable', 'true'): print(ln_free.form_of(ln_free.load(f'us/{n}')[0]))"
    code = f"from hf_xent import ln_free\n{code}"
    where = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    where.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["removable", "true"], run.stderr


def test_norms_without_weights_are_folded():
    model = ln_free.wrap(tiny("opt", layer_norm_elementwise_affine=False))
    ln_free.calibrate(model, [{"input_ids": batch()[0]}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    assert apart(model, ln_free.to_true(model)) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "opt"])
@pytest.mark.parametrize("form", ["removable", "eps trick", "true"])
def test_cache_and_padding_change_nothing(name, form):
    model = removed(name)
    if form == "eps trick" and name == "opt":
        with pytest.raises(ValueError, match="configuration of OPTForCausalLM does not set its norms' eps"):
            ln_free.to_eps_trick(model)
        return
    other = {"removable": lambda m: m, "eps trick": ln_free.to_eps_trick, "true": ln_free.to_true}[form](model)
    found = ln_free.verify(other, model)
    assert found.passed and found.form == form and max(found.cache, found.padding, found.parity) < 1e-4, found


def test_verification_fails_where_it_should():
    assert not ln_free.verify(tiny("gpt2")).passed  # it normalizes
    model = removed("gpt2")
    assert not ln_free.verify(ln_free.to_true(model), tiny("gpt2")).passed  # another model


def test_half_precision_is_refused_with_a_way_out():
    model = removed("gpt2")
    for norm in (m for m in model.modules() if isinstance(m, ln_free.FakeNorm)):
        norm.weight.data.abs_().clamp_(min=0.2)
    with pytest.raises(ValueError, match=r"float16's largest number 65504.*take eps = 1e\+06 \(logits then differ by"):
        ln_free.to_eps_trick(model, dtype=torch.float16)
    doomed = ln_free.to_eps_trick(model).half()
    assert logits(doomed).isnan().any(), "what the refusal prevents"
    mild = ln_free.to_eps_trick(model, eps=1e6, dtype=torch.float16)
    assert mild.dtype == torch.float16 and apart(model, mild) < 0.05
    assert apart(model, ln_free.to_eps_trick(model, eps=1e6)) < 1e-3
    brain = ln_free.to_eps_trick(model, dtype=torch.bfloat16)
    assert brain.dtype == torch.bfloat16 and apart(model, brain) < 0.3


@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf"), 1e40, True, "1e12"])
def test_eps_outside_of_its_range_is_refused(eps):
    with pytest.raises(ValueError, match=re.escape(f"eps is {eps!r}: choose")):
        ln_free.to_eps_trick(removed("gpt2"), eps)


def test_an_eps_that_drowns_nothing_is_refused():
    with pytest.raises(ValueError, match=r"eps is 0\.001, under which the model still normalizes"):
        ln_free.to_eps_trick(removed("gpt2"), 1e-3)
    assert ln_free.form_of(ln_free.to_eps_trick(removed("gpt2"), 10**12)) == "eps trick"  # a whole number is a number


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="no removable norms"):
        ln_free.to_eps_trick(tiny("gpt2"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel that is normalized"):
        ln_free.to_true(tiny("gpt2"))
    half = removed("gpt2")
    ln_free.restore(half, "mlp.1")
    for convert in (ln_free.to_true, ln_free.to_eps_trick):
        with pytest.raises(ValueError, match=r"1 norms are left, mlp.1 first"):
            convert(half)


def test_a_stream_that_takes_a_norm_itself_is_found_out():
    """OPT-350m normalizes after its blocks: the residual stream has the norm's output, no reader alone."""
    CONFIGS["opt after"] = lambda: CONFIGS["opt"]()
    model = ln_free.wrap(tiny("opt after", do_layer_norm_before=False))
    ln_free.calibrate(model, [{"input_ids": batch()[0]}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    with pytest.raises(RuntimeError, match="changed its logits"):
        ln_free.to_true(model)


def test_parity_is_of_sequences_in_which_the_model_does_not_overflow():
    model, ids = removed("llama"), torch.randint(1, 90, (3, 8))
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e38
    free = ln_free.to_true(model, ids)
    error, size = ln_free.parity(model, free, ids)
    assert error < 1e-4 < size
    ids[1, 2] = 0
    assert not logits(model, ids).isfinite().all()
    error, size = ln_free.parity(model, free, ids)
    assert error < 1e-4 and size == pytest.approx(ln_free.parity(model, free, ids[[0, 2]])[1], rel=1e-5)
    with pytest.raises(RuntimeError, match="overflows in every sequence of ids"):
        ln_free.to_true(model, ids[1:2])


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, ["ln-free", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_command_line(tmp_path):
    model = removed("gpt2")
    model.save_pretrained(tmp_path / "trained")
    tiny_tokenizer().save_pretrained(tmp_path / "trained")
    for source, to in (("trained", "eps-trick"), ("eps-trick", "true"), ("true", "eps-trick")):
        result = invoke("convert", tmp_path / source, tmp_path / to, "--to", to, "--json")
        assert json.loads(result.stdout)["parity"] < 1e-4
        assert "<!-- loads . -->" in (tmp_path / to / "README.md").read_text()
    with pytest.raises(ValueError, match="the folder of the model: choose another"):
        invoke("convert", tmp_path / "true", tmp_path / "true", "--to", "eps-trick")
    result = invoke("verify", tmp_path / "true", "--against", tmp_path / "trained", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["passed"] and found["form"] == "true" and found["parity"] < 1e-4
    assert "ln free" in invoke("verify", tmp_path / "eps-trick").stdout
    tiny("gpt2").save_pretrained(tmp_path / "stock")
    tiny_tokenizer().save_pretrained(tmp_path / "stock")
    assert invoke("verify", tmp_path / "stock").exit_code == 1
    with pytest.raises(ValueError, match="--to is 'onnx'"):
        invoke("convert", tmp_path / "true", tmp_path / "x", "--to", "onnx")
    with pytest.raises(ValueError, match=r"eps is 1000000\.0, but a 'true' model has no epsilon"):
        invoke("convert", tmp_path / "trained", tmp_path / "x", "--to", "true", "--eps", "1e6")
    with pytest.raises(ValueError, match=r"eps is 0\.0: choose a positive number"):
        invoke("convert", tmp_path / "trained", tmp_path / "x", "--to", "eps-trick", "--eps", "0")
    with pytest.raises(ValueError, match="float16's largest number 65504"):
        invoke("convert", tmp_path / "trained", tmp_path / "x", "--to", "eps-trick", "--dtype", "float16")
