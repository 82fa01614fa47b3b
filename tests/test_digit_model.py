"""A decoder over vectors: it looks back alone, padding and caches change nothing, and Trainer, saving and bf16 work."""

import pytest
import torch
from transformers import AutoModel, GPT2Config, LlamaConfig, LlamaModel, Trainer, TrainingArguments

from hf_xent.continuous import DigitModel, DigitModelConfig, Quantiles

ENDS = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 1}
BACKBONES = {
    "gpt2": GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, **ENDS),
    "llama": LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, **ENDS),
}
X = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
QUANTILES = Quantiles.fit(X.flatten(0, 1), 5)


def model(backbone="llama", **options):
    """A model whose outputs depend on all it reads."""
    torch.manual_seed(0)
    options = {"layers": 1, "width": 8, "heads": 2} | options
    made = DigitModel(DigitModelConfig(BACKBONES[backbone], **QUANTILES.to_dict(), **options)).eval()
    for weight in (*made.head.parameters(), *made.embed.parameters()):
        torch.nn.init.normal_(weight, std=0.5)
    return made


@pytest.mark.parametrize("kind", ["factorised", "autoregressive", "random_order"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loss_is_that_of_the_head_on_the_states_before(backbone, kind):
    made = model(backbone, kind=kind, mean=[0.1, 0.2], std=[2.0, 3.0])
    out = made(X, labels=X)
    embeds = made.embed((X - torch.tensor([0.1, 0.2])) / torch.tensor([2.0, 3.0]))
    start = made.start.weight[None].expand(3, -1, -1)
    states = made.backbone(inputs_embeds=torch.cat([start, embeds], 1)).last_hidden_state
    torch.testing.assert_close(out.last_hidden_state, states)
    nll = made.head.nll(states[:, :-1].reshape(18, -1), QUANTILES.encode(X).view(18, 2)).view(3, 6, 2)
    torch.testing.assert_close(out.nll, nll)
    torch.testing.assert_close(out.loss, nll.mean())
    assert made(X).loss is None


@pytest.mark.parametrize("inputs", ["values", "rounded", "digits"])
def test_a_vector_is_predicted_from_those_before(inputs):
    made = model(inputs=inputs)
    changed = X.clone()
    changed[:, 3] = -changed[:, 3] * 2
    with torch.no_grad():
        gap = (made(X, labels=X).nll - made(changed, labels=X).nll).abs().amax((0, 2))
        near = made(X + 1e-6, labels=X).nll - made(X, labels=X).nll
    assert (gap[:4] == 0).all() and (gap[4:] > 0).all()
    assert (near == 0).all() == (inputs != "values"), "numbers in the same cells are the same"


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(backbone, side):
    made, kept = model(backbone), slice(0, 4) if side == "right" else slice(2, 6)
    padded, mask = torch.full((3, 6, 2), torch.nan), torch.zeros(3, 6)
    padded[:, kept], mask[:, kept] = X[:, :4], 1
    alone, found = made(X[:, :4], labels=X[:, :4]), made(padded, mask, labels=padded)
    torch.testing.assert_close(found.loss, alone.loss)
    assert (found.nll * (1 - mask)[..., None] == 0).all()
    torch.testing.assert_close(found.nll[:, kept], alone.nll)
    torch.testing.assert_close(found.last_hidden_state[:, -1], alone.last_hidden_state[:, -1])


def test_labels_that_are_nan_are_not_predicted():
    made, labels = model(), X.clone()
    labels[0, 2, 1] = labels[1] = torch.nan
    out, known = made(X, labels=labels), ~labels.isnan()
    assert (out.nll != 0).equal(known)
    torch.testing.assert_close(out.loss, out.nll.sum() / known.sum())
    assert made(X, labels=torch.full_like(X, torch.nan)).loss.item() == 0


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inputs", ["values", "digits"])
def test_a_cache_draws_the_same(backbone, inputs):
    made = model(backbone, inputs=inputs, classes=3)
    given = {"steps": 5, "seed": 3, "classes": torch.tensor([0, 2, 1])}
    found = made.generate(X[:, :4], **given)
    assert found.shape == (3, 5, 2) and found.equal(made.generate(X[:, :4], **given, use_cache=False))
    assert found.equal(made.quantiles.round(found)), "values of digits alone"
    assert not found.equal(made.generate(X[:, :4], **{**given, "seed": 4}))
    assert made.generate(X[:, :0], **given).shape == (3, 5, 2)
    cold = made.generate(X[:1], 1, temperature=0, classes=torch.tensor([1]))
    states = made(X[:1], classes=torch.tensor([1])).last_hidden_state[:, -1]
    assert made.quantiles.encode(cold)[:, 0].equal(made.head.sample(states, 0))


@pytest.mark.parametrize("kind", ["autoregressive", "random_order"])
def test_trainer_learns_it(tmp_path, kind):
    made = model(kind=kind, sigma=0.5, classes=2).train()
    before = made.eval()(X, labels=X, classes=torch.tensor([0, 1, 0])).loss.item()
    rows = [{"values": x, "labels": x, "classes": torch.tensor(i % 2)} for i, x in enumerate(X)]
    options = {"max_steps": 15, "learning_rate": 2e-2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    trainer = Trainer(made, TrainingArguments(str(tmp_path), disable_tqdm=True, **options), train_dataset=rows,
                      eval_dataset=rows)  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.2
    trainer.save_model(str(tmp_path / "saved"))
    back = AutoModel.from_pretrained(tmp_path / "saved")
    given = {"values": X, "labels": X, "classes": torch.tensor([0, 1, 0])}
    torch.testing.assert_close(back(**given).nll, made.eval()(**given).nll)
    assert back.quantiles.values.equal(QUANTILES.values) and back.quantiles.tails.equal(QUANTILES.tails)


def test_digits_are_the_same_in_bfloat16(tmp_path):
    """The table of values stays in float64, whatever the model's type is."""
    model().save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert back.head.out.weight.dtype == torch.bfloat16 and back.quantiles.values.equal(QUANTILES.values)
    out = back(X, labels=X)
    assert out.loss.dtype == torch.float32 and abs(out.loss - model()(X, labels=X).loss) < 0.05
    assert back.generate(X, 2, seed=0).dtype == X.dtype


def test_a_backbone_keeps_its_weights():
    torch.manual_seed(0)
    backbone = LlamaModel(BACKBONES["llama"])
    made = DigitModel.from_backbone(backbone, QUANTILES, kind="factorised", heads=2, width=8)
    assert made.backbone is backbone and made.head.kind == "factorised" and not made.head.blocks
    assert made.get_input_embeddings() is made.embed
    fresh = DigitModel(DigitModelConfig(BACKBONES["llama"], **QUANTILES.to_dict()))
    assert all((block.modulate.weight == 0).all() for block in fresh.head.blocks), "adaLN-zero"
    assert fresh.head.blocks[0].up.weight.std() < 0.05


def test_gradients_reach_all_that_is_used():
    made = model(classes=2).train()
    made(X, labels=X, classes=torch.tensor([0, 1, 0])).loss.backward()
    unused = {name for name, weight in made.named_parameters() if weight.grad is None}
    assert unused == {"backbone.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DigitModelConfig(kind="joint"), "kind is 'joint'"),
        (lambda: DigitModelConfig(inputs="pixels"), "inputs is 'pixels': choose one of values"),
        (lambda: DigitModelConfig(mean=[0.0, 1.0]), "mean has 2 numbers"),
        (lambda: DigitModelConfig(std=[0.0]), "std has the number 0.0"),
        (lambda: DigitModelConfig(inputs="digits", std=[1.0]), "std is given, but inputs is 'digits'"),
        (lambda: DigitModelConfig(classes=-1), "classes is -1"),
        (lambda: model()(X[0]), r"values has shape \(6, 2\)"),
        (lambda: model()(X, classes=torch.zeros(3).long()), "classes is given, but the model has 0"),
        (lambda: model(classes=2)(X), "classes is missing, but the model has 2"),
        (lambda: model().generate(X, 0), "steps is 0"),
        (lambda: model().generate(X, 1, temperature=-1.0), "temperature is -1.0"),
        (lambda: model()(X, labels=X[:, :2]), r"labels has shape \(3, 2, 2\)"),
        (lambda: model(inputs="rounded")(X * torch.nan), "values has a number that is nan"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
