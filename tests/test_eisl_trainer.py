"""EISLTrainer: its stages against XentTrainer, its own inputs against dense predictions, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_xent.losses import EISL, Focal
from hf_xent.patching import patch_state
from hf_xent.trainers import EISLConfig, EISLTrainer, XentConfig, XentTrainer
from hf_xent.trainers.batches import shifts_labels
from hf_xent.trainers.own_inputs import replaced
from support.models import V, assert_same_gradients, tiny
from test_trainers import arguments, collate, losses_of, rows  # noqa: F401  rows is a fixture

IDS = {"vocab_size": V, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}


def bart():
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"d_model": 16, "dropout": 0.0}
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24) | {"max_position_embeddings": 64}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    set_seed(0)
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **IDS, bos_token_id=0, init_std=0.3))


def t5():
    set_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **IDS, initializer_factor=1.0))


MODELS = {"causal": lambda: tiny(std=0.2), "bart": bart, "t5": t5}
EVERY = pytest.mark.parametrize("kind", MODELS)
TRAINED = pytest.mark.parametrize("kind", ["causal", "bart"])


def trainer_of(folder, rows, kind="causal", trainer=EISLTrainer, model=None, **options):  # noqa: F811
    config = arguments(folder, EISLConfig if trainer is EISLTrainer else XentConfig, **options)
    model = MODELS[kind]() if model is None else model
    collator = collate if kind == "causal" else masked
    return trainer(model, config, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def masked(examples):
    """A batch whose encoder does not see padding."""
    batch = collate(examples)
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def fit(*given, **options):
    trainer = trainer_of(*given, **options)
    trainer.train()
    return trainer


@TRAINED
def test_one_stage_equals_xent_trainer(tmp_path, rows, kind):  # noqa: F811
    """All steps of cross-entropy, and none of them."""
    plain = fit(tmp_path, rows, kind, trainer=XentTrainer, max_steps=2)
    first = fit(tmp_path, rows, kind, ce_steps=99, max_steps=2)
    assert losses_of(first) == pytest.approx(losses_of(plain), rel=1e-6)
    whole = fit(tmp_path, rows, kind, trainer=XentTrainer, loss="eisl:ce_factor=0.5", max_steps=2)
    then = fit(tmp_path, rows, kind, ce_factor=0.5, max_steps=2)
    assert losses_of(then) == pytest.approx(losses_of(whole), rel=1e-6)
    assert losses_of(then) != pytest.approx(losses_of(plain), rel=1e-2)
    assert then.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-6)
    assert patch_state(then.model).materialized == 0


def test_stages_switch_at_the_step_also_when_resumed(tmp_path, rows):  # noqa: F811
    """Two steps of either; a resumed run is bit for bit the same, from before the switch and at it."""
    options = {"ce_steps": 0.5, "own_inputs": 0.5, "save_strategy": "steps", "save_steps": 1}
    straight = fit(tmp_path, rows, **options)
    plain = fit(tmp_path / "plain", rows, trainer=XentTrainer)
    assert losses_of(straight)[:2] == pytest.approx(losses_of(plain)[:2], rel=1e-6)
    assert abs(losses_of(straight)[2] - losses_of(plain)[2]) > 1e-2
    logged = [entry.get("changed_inputs") for entry in straight.state.log_history if "loss" in entry]
    assert logged[:2] == [None, None] and all(0.2 < share <= 0.6 for share in logged[2:])
    for step in (1, 2):
        resumed = trainer_of(tmp_path / "again", rows, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(straight)


@pytest.mark.parametrize("loss", ["eisl", "focal"])
def test_three_steps_equal_a_dense_reference(tmp_path, rows, loss):  # noqa: F811
    """Cross-entropy, then twice the second loss with own inputs, from dense logits; every gradient."""
    trainer, dense = trainer_of(tmp_path, rows, loss=loss, ce_steps=1, own_inputs=1.0), MODELS["causal"]().train()
    objective = EISL(ce_factor=1.0) if loss == "eisl" else Focal()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (dense, trainer.model)]
    trainer.model.train()
    for step in range(3):
        inputs = collate([rows[i] for i in range(4 * step, 4 * step + 4)])
        ids, labels, trainer.state.global_step = inputs["input_ids"], inputs["labels"], step
        if step:
            with torch.no_grad():
                own = dense(ids).logits.argmax(-1)
            ids = torch.where(labels != -100, F.pad(own[:, :-1], (1, 0)), ids)
        z, total = dense(ids).logits, 0.0
        for row, y in zip(z, labels, strict=True):  # each row has one run of labels, from its second token on
            run = y[1:][y[1:] != -100]
            if not len(run):
                continue
            x = row[: len(run)]
            total = total + (objective.reference(x, run).sum() if step else F.cross_entropy(x, run, reduction="sum"))
        expected = total / (labels[:, 1:] != -100).sum()
        expected.backward()
        loss_now = trainer.training_step(trainer.model, dict(inputs), (labels[:, 1:] != -100).sum())
        torch.testing.assert_close(loss_now, expected.detach(), rtol=1e-4, atol=1e-6)
        found, stock = ({n: p.grad for n, p in m.named_parameters()} for m in (trainer.model, dense))
        assert_same_gradients(found, stock, rtol=1e-3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert patch_state(trainer.model).materialized == 0


@EVERY
def test_own_inputs_are_the_dense_predictions(tmp_path, rows, kind):  # noqa: F811
    """All of them, a share of them, next to ignored and padded labels; labels and the mode of the model stay."""
    model = trainer_of(tmp_path, rows, kind).model.train()
    inputs = collate([rows[i] for i in range(4)])
    inputs["labels"][0, :3] = -100
    inputs["labels"][1] = -100
    name, before = ("input_ids" if kind == "causal" else "decoder_input_ids"), {k: x.clone() for k, x in inputs.items()}
    stock = MODELS[kind]().eval()
    labels = inputs["labels"]
    given = inputs["input_ids"] if kind == "causal" else stock.prepare_decoder_input_ids_from_labels(labels=labels)
    with torch.no_grad():
        own = stock(**{"input_ids": inputs["input_ids"], name: given}).logits.argmax(-1)
    batch, changed, count = replaced(model, inputs, 1.0, "0, 0")
    expected, places = given.clone(), 0
    for row in range(4):
        for t in range(1, labels.shape[1]):
            is_label = labels[row, t if kind == "causal" else t - 1] != -100
            later = labels[row, t + 1 :] if kind == "causal" else labels[row, t:]
            if is_label and (later != -100).any():
                expected[row, t], places = own[row, t - 1], places + 1
    assert torch.equal(batch[name], expected) and count == places and changed == (expected != given).sum() > 0
    assert torch.equal(batch["labels"], before["labels"]) and all(torch.equal(inputs[k], x) for k, x in before.items())
    assert model.training and patch_state(model).materialized == 0
    half, _, _ = replaced(model, inputs, 0.5, "0, 0")
    mixed = half[name] != given
    assert 0 < mixed.sum() < changed and torch.equal(half[name][mixed], expected[mixed])
    assert torch.equal(replaced(model, inputs, 0.5, "0, 0")[0][name], half[name])
    assert not torch.equal(replaced(model, inputs, 0.5, "0, 1")[0][name], half[name])


@TRAINED
def test_accumulation_does_not_change_a_step(tmp_path, rows, kind):  # noqa: F811
    """1 x 8, 2 x 4 and 8 x 1 rows of unequal lengths, with half of the inputs replaced."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "own_inputs": 0.5}
        entry = fit(tmp_path, rows, kind, **sizes, **options).state.log_history[0]
        found.append([entry[name] for name in ("loss", "grad_norm", "perplexity", "changed_inputs")])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_masked_models_train_without_own_inputs(tmp_path):
    """All target positions at once, from masks: the loss is EISL of the dense logits over the run of masks."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
    set_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=V, initializer_range=0.3, **sizes))
    masked = {"input_ids": [5, 6, 7, 3, 3, 3], "labels": [-100, -100, -100, 8, 9, 10]}
    with torch.no_grad():
        dense = model.eval()(torch.tensor([masked["input_ids"]])).logits[0, 3:]
    trainer = trainer_of(tmp_path, [masked], model=model, ce_factor=0.0)
    assert not shifts_labels(trainer.model) and shifts_labels(tiny()), "also where a patch replaced its loss"
    found = trainer.evaluate()["eval_loss"]
    expected = EISL().reference(dense, torch.tensor([8, 9, 10])).mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"own_inputs is 0\.5, but model is a BertForMaskedLM"):
        trainer_of(tmp_path, [masked], model=model, own_inputs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own_inputs": 1.5}, "own_inputs is 1.5: choose a number in"),
        ({"ce_steps": 1.5}, "ce_steps is 1.5: choose a whole number, or a share"),
        ({"ngrams": "1,x"}, "ngrams is '1,x'"),
        ({"ngram_weights": "1,x"}, "ngram_weights is '1,x': give numbers"),
        ({"ngram_weights": "1"}, "pass one positive number for each of ngrams"),
        ({"ngram_factor": 0.0}, "ngram_factor is 0, which leaves EISL out"),
        ({"loss": "focal", "ngrams": "2"}, "ngrams is '2', but the loss is 'focal'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but it smooths cross-entropy only"),
        ({"tail": 1e-3}, "tail"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(tmp_path, rows, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows, **options)


def test_what_cannot_be_replaced_is_refused(tmp_path, rows):  # noqa: F811
    with pytest.raises(ValueError, match="args is a XentConfig"):
        EISLTrainer(tiny(), arguments(tmp_path, XentConfig), train_dataset=rows)
    with pytest.raises(ValueError, match="compute_loss_func is given"):
        EISLTrainer(tiny(), arguments(tmp_path, EISLConfig), train_dataset=rows, compute_loss_func=sum)
    model = trainer_of(tmp_path, rows, "bart").model
    labels = torch.tensor([[4, 5, 2]])
    with pytest.raises(ValueError, match="no decoder_input_ids, which own_inputs replaces"):
        replaced(model, {"labels": labels, "decoder_inputs_embeds": torch.zeros(1, 3, 16)}, 1.0, "")
    with pytest.raises(ValueError, match="a batch has input_ids but no labels"):
        trainer_of(tmp_path, rows, own_inputs=1.0).compute_loss(model.train(), {"input_ids": labels})
