"""Learned contexts in front of names, their mixed training rows, and the search for negative labels."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_xent.adapt import NegativeLabels, PromptOptions, PromptTuner, negatives
from hf_xent.adapt.mixing import cross_distribution, cross_modal, partners, unsure_cross_entropy
from hf_xent.adapt.prompted import LearnedPrompts
from hf_xent.models.embeddings import class_texts, features, token_embedding
from support.two_towers import tiny_encoder, word_tokenizer

NAMES, OTHERS = ["cat", "red bird", "the dog"], ["iron", "law", "blue stone", "music", "faith"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def bert():
    return tiny_encoder("bert")


def rows(seed=0, count=20, width=16):
    """Features near the names they belong to are not needed: any will do."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(NAMES) + len(OTHERS), (count,), generator=generator)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1), labels


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_contexts_that_start_from_words_are_these_words(name, tokenizer):
    """Before any training the features are those of the whole text, so the vectors stand where its tokens do."""
    model = tiny_encoder(name)
    prompts = LearnedPrompts(model, tokenizer, NAMES, OTHERS, "a photo of")
    with torch.no_grad():
        found = prompts(torch.arange(len(prompts)), 3)
        texts = [f"a photo of {x}." for x in NAMES + OTHERS]
        batch = tokenizer(texts, return_tensors="pt", padding="max_length" if name == "siglip" else True)
        expected = features(model.eval(), {k: batch[k] for k in ("input_ids", "attention_mask")})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (8, {"clip": 12}.get(name, 16))


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_only_the_contexts_are_trained(name, tokenizer):
    model = tiny_encoder(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tuner = PromptTuner(model, tokenizer, NAMES, OTHERS, PromptOptions(context=3, epochs=2))
    assert [(key, p.numel()) for key, p in tuner.prompts.named_parameters()] == [("contexts", 2 * 3 * 16)]
    start = tuner.prompts.contexts.detach().clone()
    width = tuner.class_features().shape[1]
    tuner.fit(*rows(width=width))
    moved = (tuner.prompts.contexts - start).abs().amax((1, 2))
    assert bool((moved > 0).all()), "both are tuned"
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_of_contexts_are_those_of_finite_differences(tokenizer):
    """Each name depends on its own context alone, also if activations are computed again."""
    model = tiny_encoder("clip").double()
    prompts = LearnedPrompts(model, tokenizer, NAMES, OTHERS, 2).double()
    which, weights = torch.tensor([1, 0, 2, 6]), torch.randn(4, 12, dtype=torch.float64)
    (found,) = torch.autograd.grad((prompts(which) * weights).sum(), prompts.contexts)
    (again,) = torch.autograd.grad((prompts(which, 2) * weights).sum(), prompts.contexts)
    torch.testing.assert_close(again, found)
    for place in ((0, 0, 3), (0, 1, 7), (1, 0, 0), (1, 1, 15)):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                prompts.contexts[place] += step
                ends.append(float((prompts(which) * weights).sum()))
                prompts.contexts[place] -= step
        assert float(found[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)
    (one,) = torch.autograd.grad(prompts(torch.tensor([0, 1])).sum(), prompts.contexts)
    assert bool(one[0].abs().sum() > 0) and bool((one[1] == 0).all())


def test_a_step_is_sgd_on_the_cross_entropy_of_all_names(bert, tokenizer):
    options = PromptOptions(context="text about", mixing="none", epochs=1, batch_size=64, weight_decay=0.1)
    tuner, (x, y) = PromptTuner(bert, tokenizer, NAMES, OTHERS, options), rows()
    start = tuner.prompts.contexts.detach().clone()
    logits = 100 * x @ tuner.prompts(torch.arange(8)).T
    loss = -logits.log_softmax(-1)[torch.arange(len(y)), y].mean()
    (gradient,) = torch.autograd.grad(loss, tuner.prompts.contexts)
    assert tuner.fit(x, y) == [pytest.approx(float(loss.detach()), rel=1e-5)]
    step = gradient + 0.1 * start  # Nesterov's first step is (1 + .9) times it
    torch.testing.assert_close(tuner.prompts.contexts.detach(), start - 0.01 * 1.9 * step, rtol=1e-4, atol=1e-6)


def test_the_three_losses_are_added(bert, tokenizer):
    """At a known share, against the formulas row by row."""
    share, scale, beta = 0.7, 100.0, 0.3

    class Draw:
        def integers(self, high, size):
            return np.zeros(size, dtype=int)

        def beta(self, a, b):
            return share

        def choice(self, side, size):
            return np.resize(side, size)

    x, y = rows(3, 6)
    y = torch.tensor([0, 5, 1, 2, 7, 3])
    expected = []
    for mixing in ("none", "cross-modal", "full"):
        options = PromptOptions(context=2, mixing=mixing, beta=beta, templates=("the {}",))
        tuner = PromptTuner(bert, tokenizer, NAMES, OTHERS, options)
        with torch.no_grad():
            table = tuner.prompts(torch.arange(8))
            texts = class_texts(bert, tokenizer, NAMES + OTHERS, ["the {}"])
            logp = (scale * x @ table.T).log_softmax(-1)
            terms = [-logp[i, y[i]] for i in range(6)]
            logp = (scale * F.normalize(share * x + (1 - share) * texts[y], dim=-1) @ table.T).log_softmax(-1)
            terms += [-logp[i, y[i]] for i in range(6)] if mixing != "none" else []
            for i in range(6) if mixing == "full" else ():
                side = [1, 4, 5] if y[i] < 3 else [0, 2, 3]
                j = side[i % 3]
                v = F.normalize(share * x[i] + (1 - share) * x[j], dim=-1)
                p, w = (scale * v @ table.T).double().softmax(-1), beta * share
                both = share * p[y[i]].log() + (1 - share) * p[y[j]].log()
                terms.append(-w * p[3:].sum().log() - (1 - w) * both)
            expected.append(float(sum(terms)) / 6)
            found = tuner._loss(x, y, None if mixing == "none" else tuner._templates(y), Draw())
        assert float(found) == pytest.approx(expected[-1], rel=1e-4)
    assert expected[0] < expected[1] < expected[2]


def test_batches_of_one_side_have_no_mixture_of_both(bert, tokenizer):
    draw = np.random.default_rng(0)
    assert partners(torch.tensor([0, 1, 2]), 3, draw) is None and partners(torch.tensor([3, 4]), 3, draw) is None
    labels = torch.tensor([0, 4, 1, 6, 2, 3])
    for _ in range(10):
        assert bool(((labels < 3) != (labels[partners(labels, 3, draw)] < 3)).all())
    x, _ = rows()
    y = torch.arange(20) % 3
    only, both = (
        PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(context=2, mixing=m, epochs=1)).fit(x, y)
        for m in ("cross-modal", "full")
    )
    assert only == both


def test_mixtures_have_unit_length_and_labels_that_sum_to_one():
    x, y = rows(1, 12)
    targets, partner = F.one_hot(y, 8).float(), partners(y, 3, np.random.default_rng(1))
    for share in (0.0, 0.4, 1.0):
        mixed, soft = cross_distribution(x, targets, partner, share)
        for made in (mixed, cross_modal(x, x[partner], share)):
            torch.testing.assert_close(made.norm(dim=-1), torch.ones(12))
        torch.testing.assert_close(soft.sum(-1), torch.ones(12))
        torch.testing.assert_close(soft[:, :3].sum(-1), torch.where(y < 3, share, 1 - share))
    mixed, soft = cross_distribution(x, targets, partner, 0.0)
    assert torch.equal(soft, targets[partner])
    torch.testing.assert_close(mixed, x[partner])


def test_a_label_of_any_negative_is_their_sum():
    logits, (_, y) = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), rows(2, 6)
    targets = F.one_hot(y, 8).float()
    torch.testing.assert_close(unsure_cross_entropy(logits, targets, 0.0, 3), F.cross_entropy(logits, y))
    merged = torch.cat([logits[:, :3], logits[:, 3:].logsumexp(-1, keepdim=True)], -1)
    expected = F.cross_entropy(merged, torch.full((6,), 3))
    torch.testing.assert_close(unsure_cross_entropy(logits, targets, 1.0, 3), expected)
    mean = 0.3 * expected + 0.7 * F.cross_entropy(logits, y)
    torch.testing.assert_close(unsure_cross_entropy(logits, targets, 0.3, 3), mean)


def test_tuning_lowers_the_loss_of_rows_that_have_a_name(bert, tokenizer):
    """Rows are other texts of the names; the order of the negatives does not matter."""
    texts = class_texts(bert, tokenizer, NAMES + OTHERS, ["this is a {} text"])
    tuner = PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(context=2, mixing="none", scale=20, epochs=15))
    losses = tuner.fit(texts, torch.arange(8))
    assert losses[-1] < 0.9 * losses[0]
    order = torch.tensor([0, 1, 2, 6, 3, 7, 4, 5])
    moved = PromptTuner(bert, tokenizer, NAMES, [OTHERS[i - 3] for i in order[3:]], tuner.options)
    torch.testing.assert_close(moved.fit(texts[order], torch.arange(8))[-1], losses[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fewer", [None, 3])
def test_a_stopped_run_resumes_where_it_was(fewer, bert, tokenizer, tmp_path, monkeypatch):
    options = PromptOptions(context=2, epochs=3, batch_size=8, negatives_per_step=fewer)
    x, y = rows()
    whole = PromptTuner(bert, tokenizer, NAMES, OTHERS, options)
    losses = whole.fit(x, y)
    stopped, keep = PromptTuner(bert, tokenizer, NAMES, OTHERS, options), PromptTuner._keep

    def kept_then_stopped(self, *given):
        keep(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PromptTuner, "_keep", kept_then_stopped)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(x, y, tmp_path)
    again = PromptTuner(bert, tokenizer, NAMES, OTHERS, options)
    assert again.fit(x, y, tmp_path) == losses
    assert torch.equal(again.prompts.contexts, whole.prompts.contexts)
    other = PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(context=2, epochs=3, seed=1))
    with pytest.raises(ValueError, match="which has prompts of another run: choose another one"):
        other.fit(x, y, tmp_path)


def test_a_step_of_fewer_negatives_reuses_the_features_of_the_rest(bert, tokenizer):
    """The negatives of the batch are always among those that it embeds; with all of them nothing is reused."""
    options = {"context": 2, "batch_size": 8, "epochs": 2, "mixing": "none"}
    x, y = rows()
    every, each = (
        PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(**options, negatives_per_step=n)) for n in (None, 5)
    )
    torch.testing.assert_close(every.fit(x, y), each.fit(x, y), rtol=1e-4, atol=1e-4)
    some = PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(**options, negatives_per_step=2))
    some.bank = torch.zeros(8, 16)
    table = some._table(torch.tensor([7, 0, 1]), np.random.default_rng(0))
    fresh = torch.cat([some.class_features(), some.negative_features()])
    same = [i for i in range(8) if torch.allclose(table[i], fresh[i], atol=1e-5)]
    assert same[:3] == [0, 1, 2] and 7 in same and len(same) == 5 and int((some.bank.norm(dim=-1) == 0).sum()) == 3


def test_prompts_are_saved_and_loaded(bert, tokenizer, tmp_path):
    tuner = PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(context=2, epochs=1, templates=["a {}", "{}"]))
    tuner.fit(*rows())
    again = PromptTuner.load(tuner.save(tmp_path / "prompts.safetensors"), bert, tokenizer)
    assert again.options == tuner.options and again.names == NAMES and again.negatives == OTHERS
    assert torch.equal(again.class_features(), tuner.class_features())
    assert torch.equal(again.negative_features(), tuner.negative_features())
    assert not torch.equal(again.class_features(), PromptTuner(bert, tokenizer, NAMES, OTHERS).class_features())
    again.prompts.contexts = torch.nn.Parameter(torch.zeros(2, 3, 16))
    with pytest.raises(ValueError, match=r"contexts have the shape \(2, 2, 16\), but \(2, 3, 16\) is expected"):
        again._take(tuner.prompts.contexts)


def test_what_prompts_cannot_be_made_of_is_refused(bert, tokenizer):
    for options, message in (
        ({"mixing": "wccm"}, "mixing is 'wccm': choose one of none, cross-modal, full"),
        ({"templates": ("photo",)}, r"templates are \['photo'\]: give at least one"),
        ({"alpha": 0}, "alpha is 0"),
        ({"beta": -1}, "beta is -1"),
        ({"epochs": -1}, "epochs is -1"),
        ({"negatives_per_step": 0}, "negatives_per_step is 0"),
        ({"negatives_per_step": 6}, "negatives_per_step is 6 of 5: leave it out for all"),
        ({"context": 0}, "context is 0"),
        ({"context": ""}, "context is '', which has no token"),
        ({"context": 12}, "context has 12 vectors, but prompts have 16 tokens: leave room for names"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptTuner(bert, tokenizer, NAMES, OTHERS, PromptOptions(**options))
    with pytest.raises(ValueError, match="names number 3, negatives 0: give both"):
        PromptTuner(bert, tokenizer, NAMES, [])
    tuner, (x, y) = PromptTuner(bert, tokenizer, NAMES, OTHERS), rows()
    for labels in (y[:5], y - 9, y + 8):
        with pytest.raises(ValueError, match="give one from 0 to 7 for each row"):
            tuner.fit(x, labels)


WORDS = [("Cat", "noun"), ("stone", "noun"), ("red", "adjective"), ("stone", "adjective"), ("red_bird", "noun")] + [
    (word, kind) for kind, some in (("noun", "tree river cloud music law faith"), ("adjective", "blue green round"))
    for word in some.split()
]  # fmt: skip
ROWS = [{"word": word, "kind": kind} for word, kind in WORDS]


def test_closeness_is_a_high_quantile_of_the_cosines_to_classes():
    draw = torch.Generator().manual_seed(0)
    for classes, index in ((1, 0), (7, 6), (19, 18), (20, 19), (21, 19), (40, 38)):
        words, names = (F.normalize(torch.randn(n, 5, generator=draw), dim=-1) for n in (9, classes))
        expected = [sorted((words[i] @ names.T).tolist())[index] for i in range(9)]
        torch.testing.assert_close(negatives.closeness(words, names), torch.tensor(expected))


def test_negatives_are_the_least_close_words_in_proportion(bert, tokenizer):
    search = NegativeLabels(ROWS, count=5)
    words = search.candidates(NAMES)
    plain = [word for word, _ in words]
    assert plain == ["stone", "red", "tree", "river", "cloud", "music", "law", "faith", "blue", "green", "round"]
    found = search.mine(bert, tokenizer, NAMES)
    assert found.kinds == ["noun"] * 3 + ["adjective"] * 2 and len(found) == 5, "7 and 4 of 11"
    classes = class_texts(bert, tokenizer, NAMES, ["The nice {}."])
    expected = []
    for kind, template, count in (("noun", "The nice {}.", 3), ("adjective", "This is a {} photo.", 2)):
        those = [word for word, of in words if of == kind]
        cosines = class_texts(bert, tokenizer, those, [template]) @ classes.T
        near = sorted(zip(cosines.amax(-1).tolist(), those, strict=True))  # of 3 classes the largest is the quantile
        expected += [word for _, word in near[:count]]
    assert found.names == expected
    templates = {"noun": ["The nice {}."], "adjective": ["This is a {} photo."]}
    each = [class_texts(bert, tokenizer, [n], templates[k])[0] for n, k in zip(found.names, found.kinds, strict=True)]
    torch.testing.assert_close(found.features, torch.stack(each), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.closeness, (found.features @ classes.T).amax(-1), rtol=1e-4, atol=1e-5)


def test_a_draw_of_words_is_that_of_its_seed():
    drawn = [[w for w, _ in NegativeLabels(ROWS, count=2, limit=4, seed=s).candidates(NAMES)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4
    assert NegativeLabels(["Cat", "iron", "IRON", "law"], count=2).candidates(NAMES) == [
        ("iron", "noun"),
        ("law", "noun"),
    ]
    assert len(NegativeLabels(ROWS, count=2, limit=99).candidates(NAMES)) == 11


def test_features_of_words_are_kept_and_read_again(bert, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "CHUNK", 3)
    search, calls, texts = NegativeLabels(ROWS, count=4), [], class_texts

    def counted(*given, **options):
        calls.append(len(given[2]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return texts(*given, **options)

    whole = search.mine(bert, tokenizer, NAMES)
    monkeypatch.setattr(negatives, "class_texts", counted)
    with pytest.raises(KeyboardInterrupt):
        search.mine(bert, tokenizer, NAMES, folder=tmp_path)
    assert calls == [3, 3, 3, 1], "the names of the classes, then chunks of words"
    again = search.mine(bert, tokenizer, NAMES, folder=tmp_path)
    assert calls[4:] == [3, 1, 3, 1] and again.names == whole.names
    assert torch.equal(again.features, search.mine(bert, tokenizer, NAMES, folder=tmp_path).features)
    assert calls[8:] == [3], "of other classes, the words are known already"


def test_words_that_cannot_be_searched_are_refused(bert, tokenizer):
    for words, options, message in (
        (ROWS, {"count": 12}, "count is 12, but there are 11 words: choose at most as many"),
        ([{"word": "run", "kind": "verb"}], {"count": 1}, r"the kind 'verb': give templates for it"),
    ):
        with pytest.raises(ValueError, match=message):
            NegativeLabels(words, **options).mine(bert, tokenizer, NAMES)
    for options, message in (
        ({"count": 0}, "count is 0"),
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"limit": 5, "count": 6}, "limit is 5: choose a whole number of at least 6"),
    ):
        with pytest.raises(ValueError, match=message):
            NegativeLabels(ROWS, **options)


def test_the_table_of_tokens_is_found_in_every_tower():
    for name in ("clip", "siglip", "bert"):
        assert token_embedding(tiny_encoder(name)).weight.shape[1] == 16
