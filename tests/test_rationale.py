"""Rationales on classifiers of six architectures, against the formula on embeddings; and what weights are worth."""

import copy

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)

from hf_xent.localization import (
    Rationale,
    RationaleConfig,
    evidence_scores,
    faithfulness,
    gradient_input,
    last_attention,
    log_odds,
    occlusion,
    word_tokens,
)
from hf_xent.localization.rationale_scores import without
from support.models import tiny_tokenizer

PAD, CLS, SEP, MASK = 0, 1, 2, 3
IDS = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 40}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, num_labels=3),
    "roberta": lambda: RobertaConfig(**SIZES, **IDS, num_labels=3),
    "distilbert": lambda: DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_heads=2, n_layers=3, num_labels=3),
    "modernbert": lambda: ModernBertConfig(**SIZES, **IDS, num_labels=3),
    "gpt2": lambda: GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=3, num_labels=3, pad_token_id=PAD,
                               bos_token_id=CLS, eos_token_id=SEP),
    "llama": lambda: LlamaConfig(**SIZES, pad_token_id=PAD, bos_token_id=CLS, eos_token_id=SEP, num_labels=3),
}  # fmt: skip


def classifier(name="bert", **options):
    """A classifier whose logits differ between texts: weights are larger than those that training starts with."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.initializer_range = 0.3
    for option, value in options.items():
        setattr(config, option, value)
    return AutoModelForSequenceClassification.from_config(config).eval()


def rationale(name="bert", **options):
    inner = classifier(name)
    torch.manual_seed(1)
    model = Rationale(RationaleConfig(inner.config, special_ids=[CLS, SEP], mask_id=MASK, **options), inner)
    return model.eval()


def batch():
    """Two texts of 7 and 4 tokens, with special ones, and labels."""
    ids = torch.tensor([[CLS, 11, 12, 13, 14, 15, SEP], [CLS, 21, 22, SEP, PAD, PAD, PAD]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor([2, 0])}


def by_formula(model, inputs):
    """Loss and masks, from embeddings that the classifier is given."""
    config, inner, mask = model.config, model.classifier, inputs["attention_mask"]
    ids, y = inputs["input_ids"], inputs["labels"]
    table = inner.get_input_embeddings().weight.detach()
    constant = copy.deepcopy(inner).requires_grad_(False)
    states = inner(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2].detach()
    h = model.head.norm(states) * mask[..., None]
    words = (mask == 1) & (ids != CLS) & (ids != SEP)
    rows = torch.arange(len(y))
    m = model.head.conv(h.transpose(1, 2)).sigmoid()[rows, y]

    def logits(kept):
        w = torch.where(words, kept, 1)[..., None]
        return constant(inputs_embeds=w * table[ids] + (1 - w) * table[MASK], attention_mask=mask).logits

    z, s, b = logits(torch.ones_like(m)), logits(m), logits(1 - m)
    whole, outside = ((x - x.mean(1, keepdim=True))[rows, y].relu() for x in (z, b))
    bas = torch.where(outside > whole, 1 + outside - outside.detach(), outside / (whole + 1e-8))
    area = torch.stack([m[i][words[i]].mean() for i in range(len(y))])
    loss = cross_entropy(z, y) + config.alpha * cross_entropy(s, y) + config.gamma * bas.mean()
    return loss + config.beta * area.mean(), m * words


@pytest.mark.parametrize("weights", [(0, 0, 0), (0.7, 0, 0.3), (0.4, 1.5, 1.2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_weighed_embeddings(name, weights):
    model = rationale(name, **dict(zip(("alpha", "gamma", "beta"), weights, strict=True)))
    inputs = batch()
    if name in ("gpt2", "llama"):  # given embeddings, they read the last place, padding or not
        inputs = {key: x[:1] for key, x in inputs.items()}
    found = model(**inputs)
    expected, masks = by_formula(model, inputs)
    torch.testing.assert_close(found.loss, expected)
    labelled = model.train()(**inputs).masks
    if name == "modernbert":  # no dropout by default: the masks of training are those of the labels
        torch.testing.assert_close(labelled, masks.detach())
    if any(weights):
        parameters = list(model.head.parameters())
        model.eval()
        mine = torch.autograd.grad(model(**inputs).loss, parameters)
        for one, other in zip(mine, torch.autograd.grad(expected, parameters), strict=True):
            if not weights[1]:  # where BAS is 1, its gradient differs from the constant's
                torch.testing.assert_close(one, other)
            assert one.abs().max() > 0


@pytest.mark.parametrize("erase", ["inputs", "states"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_the_batch_change_nothing(name, erase):
    model, inputs = rationale(name, erase=erase, layer=2), batch()
    together = model(**inputs)
    losses = []
    for i, length in enumerate((7, 4)):
        one = model(**{key: x[i : i + 1, :length] if x.ndim == 2 else x[i : i + 1] for key, x in inputs.items()})
        torch.testing.assert_close(one.logits[0], together.logits[i])
        torch.testing.assert_close(one.masks[0], together.masks[i, :length])
        losses.append(one.loss)
    torch.testing.assert_close(together.loss, torch.stack(losses).mean())
    assert (together.masks[1, [0, 3, 4, 5, 6]] == 0).all() and (together.masks[0, 1:6] > 0).all()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_classifier_learns_from_whole_texts_alone(name):
    inputs = batch()
    plain = classifier(name)
    plain(**inputs).loss.backward()
    gradients = {key: p.grad for key, p in plain.named_parameters()}
    for joint in (False, True):
        model = rationale(name, joint=joint)
        model(**inputs).loss.backward()
        same = [torch.allclose(p.grad, gradients[key]) for key, p in model.classifier.named_parameters()
                if p.grad is not None]  # fmt: skip
        assert all(same) != joint
    frozen = rationale(name)
    frozen.classifier.requires_grad_(False)
    frozen(**inputs).loss.backward()
    assert all(p.grad is None for p in frozen.classifier.parameters())
    assert all(p.grad.abs().max() > 0 for p in frozen.head.conv.parameters())


def test_a_mask_of_nothing_leaves_everything():
    model = rationale(alpha=0, beta=0)
    torch.nn.init.zeros_(model.head.conv.weight)
    torch.nn.init.constant_(model.head.conv.bias, -40.0)
    z = model(**batch()).logits
    above = z.gather(1, batch()["labels"][:, None])[:, 0] > z.mean(1)
    bas = model(**batch()).loss - cross_entropy(z, batch()["labels"])
    torch.testing.assert_close(bas, above.float().mean())  # 1, or 0 where the class has no activation at all


def test_texts_without_a_label_and_without_words():
    model, inputs = rationale(), batch()
    first = model(**{key: x[:1] for key, x in inputs.items()})
    inputs["labels"][1] = -100
    torch.testing.assert_close(model(**inputs).loss, first.loss)
    model.train()(**inputs).loss.backward()
    inputs["labels"][:] = -100
    empty = model.eval()(**inputs)
    assert empty.loss == 0 and empty.loss.requires_grad
    unlabelled = model(inputs["input_ids"], inputs["attention_mask"])
    assert unlabelled.loss is None and not unlabelled.masks.requires_grad
    torch.testing.assert_close(unlabelled.masks, empty.masks)
    bare = model(torch.tensor([[CLS, SEP]]), labels=torch.tensor([1]))
    assert bare.loss.isfinite() and bare.masks.tolist() == [[0, 0]]


def test_checkpoints_and_low_precision():
    found = []
    for checkpoints in (False, True):
        model = rationale("llama", joint=True).train()
        if checkpoints:
            inner = model.classifier  # the name of transformers 6, if it is there
            getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)()
        model(**batch()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    whole, half = rationale(), rationale().bfloat16()
    inputs = batch()
    loss = half(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32 and half.head.conv.weight.grad.isfinite().all()
    torch.testing.assert_close(half(**inputs).masks.float(), whole(**inputs).masks, atol=2**-6, rtol=2**-6)


def test_a_tokenizer_tells_what_no_word_is():
    tokenizer = tiny_tokenizer("one two three")
    model = Rationale.from_classifier(classifier(), tokenizer, beta=0.2)
    fill = [tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert model.config.beta == 0.2 and model.config.mask_id == next(x for x in fill if x is not None)
    assert tokenizer.pad_token_id in model.config.special_ids
    assert model.config.id2label == model.classifier.config.id2label
    assert model.get_input_embeddings() is model.classifier.get_input_embeddings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"erase": "attention"}, "erase is 'attention'"),
        ({"beta": -1}, "beta is -1: choose 0 or more"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"layer": 4}, "layer is 4: the classifier has layers 1 to 3"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        rationale(**options)


def test_classifiers_of_other_kinds_are_refused():
    for options in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        with pytest.raises(ValueError, match="one of two or more classes"):
            RationaleConfig(BertConfig(**SIZES, **options))
    with pytest.raises(ValueError, match="merge_and_unload"):
        Rationale.from_classifier(torch.nn.Linear(2, 2), None)


def planted(count, seed):
    """Texts of six words; one, 10 + y or 20 + y, is the evidence."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, 40, (count, 8), generator=draw)
    ids[:, 0], ids[:, -1] = CLS, SEP
    y = torch.arange(count) % 3
    places = torch.randint(1, 7, (count,), generator=draw)
    ids[torch.arange(count), places] = 10 + y + 10 * torch.randint(2, (count,), generator=draw)
    return ids, y, torch.nn.functional.one_hot(places, 8).bool()


def test_the_trainer_finds_planted_words(tmp_path):
    ids, y, _ = planted(360, 0)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, y, strict=True)]
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_hidden_layers": 2, "hidden_size": 32}, num_labels=3, initializer_range=0.1)
    model = Rationale(RationaleConfig(config, layer=1, special_ids=[CLS, SEP], mask_id=MASK))
    options = {"per_device_train_batch_size": 24, "learning_rate": 4e-3, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(tmp_path, max_steps=110, disable_tqdm=True, **options)
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:24],
        compute_metrics=lambda found: {"right": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_right"] == 1
    ids, y, evidence = planted(30, 1)
    words = word_tokens(ids, torch.ones_like(ids), [CLS, SEP])
    scores = evidence_scores(model.eval()(ids).masks, evidence, words, threshold=0.5)
    assert scores["average precision"].mean() > 0.75 and scores["F1"].mean() > 0.5
    found = faithfulness(model.classifier, {"input_ids": ids}, model(ids).masks, words, (0.1,))
    chance = faithfulness(model.classifier, {"input_ids": ids}, torch.rand(ids.shape), words, (0.1,))
    assert found["comprehensiveness"].mean() > chance["comprehensiveness"].mean() + 0.2
    assert found["sufficiency"].mean() < chance["sufficiency"].mean() - 0.2


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_attributions_by_hand(name):
    model, inputs = classifier(name, _attn_implementation="eager"), batch()
    labels = inputs.pop("labels")
    ids, mask = inputs.values()
    table = model.get_input_embeddings().weight
    if name == "bert":
        e = table[ids].detach().requires_grad_()
        z = model(inputs_embeds=e, attention_mask=mask).logits
        z[0, 2].add(z[1, 0]).backward()
        torch.testing.assert_close(gradient_input(model, inputs, labels), (e.grad * e).sum(-1).abs().detach())
    assert table.grad is None or name == "bert"
    heads = model(**inputs, output_attentions=True).attentions[-1].mean(1)
    torch.testing.assert_close(last_attention(model, inputs), heads[:, 0])
    torch.testing.assert_close(last_attention(model, inputs, -1), torch.stack([heads[0, 6], heads[1, 3]]))
    words = word_tokens(ids, mask, [CLS, SEP])
    found, whole = occlusion(model, inputs, words, labels, batch_size=4), model(**inputs).logits
    less = model(torch.tensor([[CLS, 11, 12, 14, 15, SEP]])).logits
    torch.testing.assert_close(found[0, 3], whole[0, 2] - less[0, 2])
    assert (found[~words] == 0).all() and found[words].ne(0).all()
    with pytest.raises(ValueError, match="query is 1"):
        last_attention(model, inputs, 1)


def test_log_odds_of_texts():
    table = log_odds([[4, 4, 5], [5], [6]], [0, 0, 1], 7, 2)
    torch.testing.assert_close(table[0, 4], torch.tensor(1.5 / 3).log() - torch.tensor(0.5 / 2).log())
    torch.testing.assert_close(table[1, 5], torch.tensor(0.5 / 2).log() - torch.tensor(2.5 / 3).log())


def test_faithfulness_by_hand():
    model, inputs = classifier(), batch()
    del inputs["labels"]
    words = word_tokens(*inputs.values(), [CLS, SEP])
    weights = torch.tensor([[9, 0.1, 0.5, 0.3, 0.2, 0.0, 9], [9, 0.2, 0.1, 9, 9, 9, 9]])
    found = faithfulness(model, inputs, weights, words, (0.4,))

    def p(*ids):
        return model(torch.tensor([ids])).logits.softmax(-1)[0]

    full, y = p(CLS, 11, 12, 13, 14, 15, SEP), p(CLS, 11, 12, 13, 14, 15, SEP).argmax()
    expected = full[y] - p(CLS, 11, 14, 15, SEP)[y], full[y] - p(CLS, 12, 13, SEP)[y]
    torch.testing.assert_close(torch.stack([x[0] for x in found.values()]), torch.stack(expected))
    full, y = p(CLS, 21, 22, SEP), p(CLS, 21, 22, SEP).argmax()
    torch.testing.assert_close(found["comprehensiveness"][1], full[y] - p(CLS, 22, SEP)[y])
    for shares in ((), (0,), (0.5, 2)):
        with pytest.raises(ValueError, match="shares has"):
            faithfulness(model, inputs, weights, words, shares)


def test_a_text_that_loses_all_its_tokens():
    ids = torch.tensor([[5, 6, 7], [8, 9, PAD]])
    fewer = without({"input_ids": ids}, torch.tensor([[0, 1, 0], [1, 1, 1]]).bool(), pad_id=4)
    assert fewer["input_ids"].tolist() == [[5, 7], [4, 4]] and fewer["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_evidence_scores_against_scikit_learn():
    torch.manual_seed(0)
    weights = (torch.rand(5, 12) * 6).round() / 6  # with ties
    evidence, words = torch.rand(5, 12) < 0.4, torch.rand(5, 12) < 0.8
    evidence[4] = False
    found = evidence_scores(weights, evidence, words, threshold=0.5)
    kinds = {"precision": precision_score, "recall": recall_score, "F1": f1_score, "IoU": jaccard_score}
    for i in range(4):
        y, x = evidence[i][words[i]].numpy(), weights[i][words[i]].numpy()
        assert found["average precision"][i].item() == pytest.approx(average_precision_score(y, x))
        for name, kind in kinds.items():
            assert found[name][i].item() == pytest.approx(kind(y, x >= 0.5))
    assert all(x[4].isnan() for x in found.values())
    same = evidence_scores(weights, evidence, words)
    assert torch.equal(same["precision"][:4], same["recall"][:4])
    assert evidence_scores(evidence.float(), evidence, words)["IoU"][:4].eq(1).all()
