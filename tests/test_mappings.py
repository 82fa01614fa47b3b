"""Models beside causal LMs: T5, Whisper, BERT, BART, ModernBERT: their own targets, losses, biases and heads.

`test_zoo.py` compares every class with stock; here the loss that takes the place of a model's cross-entropy is compared
with its formula on dense logits.
"""

from itertools import groupby

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    MoshiConfig,
    MoshiForConditionalGeneration,
    T5Config,
    Trainer,
    TrainingArguments,
)

from hf_xent.lazy import OBJECTIVE, LazyLogits
from hf_xent.losses import EISL, EMO, CrossEntropy, Focal
from hf_xent.ops import Head
from hf_xent.patching import compare, head_of, patch, patch_state, unpatch
from hf_xent.trainers import XentConfig, XentTrainer
from support.models import V, assert_same_gradients
from support.oracle import Largest, assert_no_worse
from support.tiny_configs import tiny_config
from support.zoo import MAPPINGS, build, run_stock
from support.zoo_inputs import inputs_of, text_inputs

# computed by the model itself in most seq2seq, masked and speech models; by ForMaskedLMLoss in EuroBERT
# and T5Gemma 2
CASES = [
    ("Seq2seq", "t5"),
    ("Seq2seq", "bart"),
    ("Seq2seq", "t5gemma2"),
    ("Masked LM", "bert"),
    ("Masked LM", "xlm"),
    ("Masked LM", "eurobert"),
    ("Speech-seq2seq", "whisper"),
    ("Speech-seq2seq", "speech_to_text"),
]
LOSSES = {
    "focal": Focal(gamma=2.0),
    "emo": EMO(),
    "eisl": EISL(ngrams=(1, 2), ce_factor=0.3),
    "z-loss": CrossEntropy(z_loss=1e-2),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # what models warn of in their tiny configurations


def made(mapping, model_type):
    """A model in evaluation mode and float64, and inputs that it takes."""
    if model_type not in MAPPINGS[mapping][1]:
        pytest.skip(f"this transformers has no {model_type}")
    model = build(mapping, model_type)
    _, inputs, _ = run_stock(model, inputs_of(mapping, model))
    assert next(model.parameters()).dtype == torch.float64
    return model.eval(), inputs


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def runs(labels):
    """The positions of each stretch of labels in a row."""
    for row, ids in enumerate(labels.tolist()):
        for labeled, group in groupby(range(len(ids)), key=lambda t, ids=ids: ids[t] != -100):
            if labeled:
                yield row, list(group)


def dense(loss, logits, labels, weight):
    """The mean of a loss by its formula on logits [B, T, V] and labels aligned with them."""
    losses = [loss.reference(logits[row, run], labels[row, run], weight=weight.detach()) for row, run in runs(labels)]
    return torch.cat(losses).mean()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("mapping", "model_type"), CASES)
def test_another_loss_takes_the_place_of_the_models_own(mapping, model_type, name):
    model, inputs = made(mapping, model_type)
    loss, labels = LOSSES[name], inputs["labels"]
    logits = model(**inputs).logits
    expected = dense(loss, logits.double(), labels, head_of(model).weight)
    stock = gradients(model, expected)
    patch(model, loss=loss)
    out = model(**inputs)
    ours, state = gradients(model, out.loss), patch_state(model)
    assert state.streamed == 1 and state.materialized == 0 and isinstance(out.logits, LazyLogits)
    torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=1e-6, atol=0)
    assert_same_gradients(ours, stock, rtol=1e-5)
    assert unpatch(model)(**inputs).loss.isfinite()


@pytest.mark.parametrize("loss", [None, "focal", "emo"])
@pytest.mark.parametrize(
    ("auto", "kind"),
    [(AutoModelForSeq2SeqLM, T5Config), (AutoModelForSeq2SeqLM, BartConfig), (AutoModelForMaskedLM, BertConfig)],
)
def test_no_tensor_is_as_large_as_the_logits(auto, kind, loss):
    """Nor larger than the head's weight, with the rows of logits in memory bounded."""
    vocabulary, inputs = 1501, text_inputs(rows=4, length=24)
    model = patch(auto.from_config(tiny_config(kind, vocab_size=vocabulary)), loss=loss, memory_budget=32_000)
    with Largest() as largest:
        model(**inputs).loss.backward()
    assert largest.numel <= vocabulary * 32 < inputs["labels"].numel() * vocabulary
    assert patch_state(model).streamed == 1


def test_outside_of_a_call_cross_entropy_is_itself():
    model, inputs = made("Seq2seq", "t5")
    stock = F.cross_entropy(model(**inputs).logits.flatten(0, 1), inputs["labels"].flatten())
    patch(model, loss="focal")
    out = model(**inputs)
    torch.testing.assert_close(F.cross_entropy(out.logits.flatten(0, 1), inputs["labels"].flatten()), stock)
    assert not torch.isclose(out.loss, stock)
    with pytest.raises(IndexError):  # a call that fails leaves no loss behind either
        model(input_ids=torch.tensor([[10 * V]]), labels=inputs["labels"][:1])
    assert OBJECTIVE.get() is None


def test_a_model_within_a_model_has_its_own_loss():
    (inner, inputs), (outer, _) = made("Masked LM", "bert"), made("Masked LM", "roberta")
    plain, focal = inner(**inputs).loss, patch(outer, loss="focal")(**inputs).loss
    kind, beside = type(outer), []

    class Around(kind):
        def forward(self, **inputs):
            beside.append(patch(inner)(**inputs).loss)
            return kind.forward(self, **inputs)

    outer.__class__ = Around
    torch.testing.assert_close(patch(outer, loss="focal")(**inputs).loss, focal)
    torch.testing.assert_close(beside[0], plain)


def test_reductions_and_weights_of_the_models_own_cross_entropy():
    """Whatever a model asks of F.cross_entropy: weights of classes, its own ignored index, no reduction."""
    model, inputs = made("Masked LM", "bert")
    labels = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    weight = torch.rand(V, dtype=torch.float64) + 0.5
    kind = type(model)

    class Asking(kind):
        def forward(self, input_ids, labels, **options):
            logits = super().forward(input_ids=input_ids).logits
            loss = F.cross_entropy(logits.view(-1, V), labels.view(-1), **options)
            return {"loss": loss, "logits": logits}

    model.__class__ = Asking
    logits = kind.forward(model, input_ids=inputs["input_ids"]).logits.view(-1, V)
    focal = Focal(gamma=2.0).reference(logits, labels.view(-1))
    keep, of_class = labels.view(-1) != 5, weight[labels.view(-1)]
    patch(model, loss="focal:gamma=2.0")
    for options, expected in (
        ({"ignore_index": 5, "reduction": "none"}, focal * keep),
        ({"ignore_index": 5, "reduction": "sum"}, (focal * keep).sum()),
        ({"weight": weight}, (focal * of_class).sum() / of_class.sum()),
        ({"weight": weight, "reduction": "none", "ignore_index": 5}, focal * of_class * keep),
    ):
        loss = model(input_ids=inputs["input_ids"], labels=labels, **options)["loss"]
        torch.testing.assert_close(loss, expected)
    with pytest.raises(RuntimeError, match=r"label_smoothing=0.1\), which Focal"):
        model(input_ids=inputs["input_ids"], labels=labels, label_smoothing=0.1)


def test_a_loss_of_sequences_needs_whole_sequences():
    """ModernBERT may score masked tokens alone: losses of tokens take them, EISL refuses."""
    model, inputs = made("Masked LM", "modernbert")
    labels = inputs["labels"]
    logits = model(**inputs).logits
    assert logits.shape == (int((labels != -100).sum()), V)
    expected = Focal().reference(logits, labels[labels != -100]).mean()
    torch.testing.assert_close(patch(model, loss="focal")(**inputs).loss.double(), expected, rtol=1e-6, atol=0)
    counted = patch(model, loss="focal")(**inputs, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(counted.double(), expected * len(logits) / 50, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match=r"EISL.* compares the positions of a sequence"):
        patch(model, loss="eisl")(**inputs)


@pytest.mark.parametrize("loss", [CrossEntropy(), Focal(gamma=2.0)])
@pytest.mark.parametrize("case", [("Seq2seq", "t5"), ("Seq2seq", "bart"), ("Masked LM", "bert")])
def test_bfloat16_models_are_no_worse_than_plain_torch(case, loss):
    model = build(*case).to(torch.bfloat16).float().eval()
    inputs = text_inputs()
    weight = head_of(model).weight
    truth = dense(loss, model(**inputs).logits.double(), inputs["labels"], weight)
    true_gradients = gradients(model, truth)
    model = model.to(torch.bfloat16)
    plain = dense(loss, model(**inputs).logits.float(), inputs["labels"], weight)
    plain_gradients = gradients(model, plain)
    ours = patch(model, loss=loss)(**inputs).loss
    assert abs(ours - truth) <= 2 * abs(plain - truth) + 2**-8 * truth.abs()  # some return it in bfloat16
    found = gradients(model, ours)
    assert found.keys() == true_gradients.keys() and patch_state(model).materialized == 0
    for name, true in true_gradients.items():
        assert_no_worse(found[name], plain_gradients[name], true, what=name)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_bias_of_barts_logits_joins_the_head_under_autocast(shift):
    """It is float32 there and the product bfloat16; no worse than stock, with a bias far from zero too."""
    model = build("Seq2seq", "bart").eval()
    model.final_logits_bias += shift * torch.linspace(-1, 1, V)
    inputs = text_inputs()
    exact = model(**inputs).loss
    truth = gradients(model, exact)
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(**inputs)
        ours = patch(model)(**inputs)
    state = patch_state(model)
    assert (state.streamed, state.materialized) == (1, 0) and ours.logits.dtype == stock.logits.dtype == torch.float32
    assert abs(ours.loss - exact) <= 2 * abs(stock.loss - exact) + 1e-3
    name = "model.shared.weight"
    ours_error, stock_error = ((gradients(model, out.loss)[name] - truth[name]).norm() for out in (ours, stock))
    assert ours_error <= 2 * stock_error + 1e-5


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(V,), (1, V), (1, 1, V)])
def test_a_bias_of_any_shape_and_width_joins_the_head(shape, dtype, trained):
    """Also after a scale, in front of a softcap, and beside a bias that the head has."""
    torch.manual_seed(0)
    hidden, weight, own = (torch.randn(*s, requires_grad=True) for s in ((2, 5, 8), (V, 8), (V,)))
    added = torch.randn(shape, dtype=dtype, requires_grad=trained)
    labels = torch.randint(V, (10,))
    labels[3] = -100

    def loss(z):
        z = 2 * torch.tanh((z * 0.5 + added) / 2)
        assert z.dtype == dtype
        return F.cross_entropy(z.view(-1, V), labels)

    leaves = [hidden, weight, own, *([added] if trained else [])]
    lazy = LazyLogits.of(hidden, Head(weight, own))
    ours, expected = loss(lazy), loss(F.linear(hidden, weight, own))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))
    assert lazy.state.materialized == 0 and lazy.state.streamed == 1


def test_moshi_streams_its_text_and_keeps_the_logits_of_its_codebooks():
    """Its labels have names of their own; the head of the codebooks has a weight for each position."""
    config = tiny_config(MoshiConfig)
    torch.manual_seed(0)
    model = MoshiForConditionalGeneration(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = text_inputs()["input_ids"]
    names = ("user_audio_codes", "moshi_audio_codes", "audio_labels")
    codes = {name: torch.randint(config.audio_vocab_size, (2, config.num_codebooks, ids.shape[1])) for name in names}
    inputs = {"input_ids": ids, "text_labels": ids, **codes}
    stock = model(**inputs)
    expected = gradients(model, stock.loss)
    ours = patch(model)(**inputs)
    state = patch_state(model)
    assert isinstance(ours.logits, LazyLogits) and not isinstance(ours.audio_logits, LazyLogits)
    assert (state.streamed, state.materialized, state.bypassed) == (1, 0, 0)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert_same_gradients(gradients(model, ours.loss), expected)


def test_csm_takes_another_loss_for_its_first_codebook_alone():
    model, inputs = made("Text-to-waveform", "csm")
    stock = model(**inputs)
    ours = patch(model, loss="focal")(**inputs)
    logits, labels = stock.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:, 0].flatten()
    expected = Focal().reference(logits[labels != -100], labels[labels != -100]).mean()
    torch.testing.assert_close(ours.backbone_loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.depth_decoder_loss, stock.depth_decoder_loss)
    assert patch_state(model).streamed == 1 and patch_state(model).materialized == 0


def test_a_head_is_found_where_the_model_names_another_layer():
    """FSMT names embeddings that are not its head, BLIP leaves it to its decoder to know, a set of models has none."""
    fsmt, blip = build("Seq2seq", "fsmt"), build("Image-text", "blip")
    assert isinstance(fsmt.get_output_embeddings(), nn.Embedding) and blip.get_output_embeddings() is None
    assert head_of(fsmt) is fsmt.model.decoder.output_projection
    assert head_of(blip) is blip.text_decoder.cls.predictions.decoder
    fsmt.model.decoder.extra = nn.Linear(*reversed(fsmt.get_output_embeddings().weight.shape))
    with pytest.raises(ValueError, match=r"head is a Embedding.*linear_cross_entropy"):
        head_of(fsmt)
    with pytest.raises(ValueError, match=r"no output embeddings.*linear_cross_entropy"):
        head_of(build("Text-to-waveform", "qwen2_5_omni"))
    with pytest.raises(ValueError, match=r"head is a ModuleList.*linear_cross_entropy"):
        head_of(build("Causal LM", "musicgen"))


def test_verify_and_compare_run_any_model():
    """On random tokens, or on a batch where a model takes more than tokens."""
    for mapping, model_type in (
        ("Seq2seq", "t5"),
        ("Seq2seq", "fsmt"),
        ("Masked LM", "bert"),
        ("Masked LM", "modernbert"),
    ):
        model = patch(build(mapping, model_type).eval(), loss="focal", verify=True)
        report = compare(model)
        assert report.equal and report.lean and report.exact_gradient_error is not None
    whisper, inputs = made("Speech-seq2seq", "whisper")
    with pytest.raises(ValueError, match=r"takes input_features, and not tokens alone: pass batch="):
        compare(whisper)
    report = compare(patch(whisper, loss="focal", verify=inputs), batch=inputs)
    assert report.equal and report.lean and report.head == "proj_out" and patch_state(whisper).streamed == 0


def test_verify_refuses_a_model_that_differs_on_the_batch(monkeypatch):
    whisper, inputs = made("Speech-seq2seq", "whisper")
    monkeypatch.setattr(CrossEntropy, "of", lambda self, stats: 1.01 * stats.nll)
    with pytest.raises(RuntimeError, match="WhisperForConditionalGeneration does not compute the same loss"):
        patch(whisper, verify=inputs)


@pytest.mark.parametrize("case", [("Seq2seq", "t5"), ("Masked LM", "modernbert")])
def test_a_trainer_of_any_model_has_stocks_history(case, tmp_path):
    rows = Dataset.from_dict({name: x.tolist() for name, x in text_inputs(rows=6).items()})
    options = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1}
    options |= {"report_to": "none", "learning_rate": 1e-2}

    def history(make):
        torch.manual_seed(0)
        model = build(*case).float()
        for layer in filter(lambda layer: isinstance(layer, nn.Dropout), model.modules()):
            layer.p = 0.0
        trainer = make(model)
        trainer.train()
        return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    _, stock = history(lambda model: Trainer(model, TrainingArguments(**options), train_dataset=rows))
    trainer, ours = history(lambda model: XentTrainer(model, XentConfig(**options), train_dataset=rows))
    _, focal = history(lambda model: XentTrainer(model, XentConfig(**options, loss="focal"), train_dataset=rows))
    assert ours == pytest.approx(stock, rel=1e-5) and len(stock) == 2
    assert all(lower < loss for lower, loss in zip(focal, ours, strict=True))
    logged = trainer.state.log_history[0]
    assert logged["perplexity"] == pytest.approx(torch.tensor(ours[0]).exp().item(), rel=1e-3) and logged["entropy"] > 0
