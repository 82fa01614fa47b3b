"""TFUP and TFUP-T: the golden numbers, a reference in loops, and what must not change anything."""

import random
import runpy
from itertools import product
from math import exp, log
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from hf_xent.adapt import TFUP, TFUPT, TFUPTConfig, class_texts, features
from support.models import tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
W = torch.eye(2)
ROWS = torch.tensor([[1, 0.8], [0.2, 1]])
KEYS = F.normalize(torch.tensor([[1, 0.1], [0.9, 0.3], [0.1, 1]]))
LABELS = torch.tensor([0, 0, 1])
GOLDEN = torch.tensor([[79.331547, 62.579869], [19.869681, 98.865801]])


def golden(**options):
    """The cache of the golden numbers."""
    cache = TFUP(W, **options)
    cache.keys, cache.labels = KEYS, LABELS
    return cache


def clusters(n=90, c=3, d=8, noise=0.25, seed=0):
    """Rows around c orthogonal directions, their classes, and names that lie beside these directions."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.linalg.qr(torch.randn(d, c, generator=draw)).Q.T
    labels = torch.arange(n) % c
    rows = centers[labels] + noise * torch.randn(n, d, generator=draw)
    names = centers + 0.7 * centers[[*range(1, c), 0]] + 0.2 * torch.randn(c, d, generator=draw)
    return rows, labels, names


def test_golden_numbers():
    """Each stage of steps 2 and 3, in the order of the formula."""
    cache = golden()
    torch.testing.assert_close(cache.logits(ROWS), GOLDEN, rtol=1e-6, atol=2e-5)
    f = F.normalize(ROWS)
    p, q = (10 * f @ W.T).softmax(-1), (10 * KEYS @ W.T).softmax(-1)
    kl = (p[:, None] * (p[:, None] / q).log()).sum(-1)
    expected = torch.tensor([[1.091729, 0.637219, 6.941399], [8.948492, 6.320404, 0.000172]])
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)
    affinity = torch.tensor([[1.745962, 2.402924, 0.367879], [0.367879, 0.492347, 2.692465]])
    for k in range(3):  # the weight of one key is what the cache adds if the others' class is another
        cache.labels = (torch.arange(3) != k).long()
        added = (cache.logits(ROWS) - 100 * f @ W.T)[:, 0] / 0.3
        torch.testing.assert_close(added, affinity[:, k], rtol=1e-3, atol=1e-4)  # differences of 100 in float32
    assert golden().predict(ROWS).tolist() == [0, 1]


def test_step_one_is_the_loops_of_its_definition():
    rows, _, names = clusters(n=20)
    f, w, count = F.normalize(rows).double(), F.normalize(names).double(), 4
    p = [[float(x) for x in row] for row in (10 * f @ w.T).softmax(-1)]
    expected = []
    for i in range(3):
        nearest = sorted(range(20), key=lambda j: -p[j][i])[: 2 * count]
        score = {}
        for j in nearest:
            score[j] = sum(p[j][c] * log(p[j][c] / p[m][c]) for m, c in product(nearest, range(3)))
        expected += sorted(nearest, key=score.__getitem__)[:count]
    cache = TFUP(names, count=count).fit(rows)
    assert cache.rows.tolist() == expected
    assert cache.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    torch.testing.assert_close(cache.keys, f[expected].float())


def test_steps_two_and_three_are_the_loops_of_their_definition():
    rows, _, names = clusters(n=12)
    cache = TFUP(names, count=3, alpha=0.7, beta=1.5, scale=20.0, sharpness=4.0).fit(rows)
    f, w, keys = F.normalize(rows).double(), F.normalize(names).double(), cache.keys.double()
    p, q = (4 * f @ w.T).softmax(-1), (4 * keys @ w.T).softmax(-1)
    for t in range(12):
        kl = [sum(float(p[t, c] * (p[t, c] / q[k, c]).log()) for c in range(3)) for k in range(9)]
        z = [20 * float(f[t] @ w[c]) for c in range(3)]
        for k in range(9):
            similar = 2 * (1 - (kl[k] - min(kl)) / (max(kl) - min(kl)))
            z[int(cache.labels[k])] += 0.7 * exp(-(1.5 - 1.5 * float(f[t] @ keys[k]) * similar))
        torch.testing.assert_close(cache.logits(rows)[t], torch.tensor(z), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n", "count"), [(12, 9), (90, 9), (117, 11), (300, 16), (3, 3)])
def test_the_number_of_keys_is_three_tenths_of_the_rows_within_nine_and_sixteen(n, count):
    rows, _, names = clusters(n=n)
    cache = TFUP(names).fit(rows)
    assert cache.labels.bincount().tolist() == [min(count, n)] * 3  # a class has no more keys than there are rows
    assert cache.logits(rows).isfinite().all()


def test_what_must_not_matter_does_not():
    rows, _, names = clusters()
    cache = TFUP(names).fit(rows)
    found = cache.logits(rows)
    plain = 100 * F.normalize(rows) @ F.normalize(names).T
    torch.testing.assert_close(TFUP(names, alpha=0.0).fit(rows).logits(rows), plain)
    order = torch.randperm(len(cache.keys), generator=torch.Generator().manual_seed(0))
    cache.keys, cache.labels = cache.keys[order], cache.labels[order]
    torch.testing.assert_close(cache.logits(rows), found, rtol=1e-5, atol=1e-4)
    longer = TFUP(3 * names).fit(7 * rows)  # only directions count
    torch.testing.assert_close(longer.logits(0.1 * rows), found, rtol=1e-5, atol=1e-4)
    parts = torch.cat([cache.logits(rows[:1]), cache.logits(rows[1:])])
    torch.testing.assert_close(parts, found, rtol=1e-5, atol=1e-4)
    many = rows.repeat(15, 1)  # 1,350 rows: more than are read at a time
    torch.testing.assert_close(cache.logits(many), found.repeat(15, 1), rtol=1e-5, atol=1e-4)
    assert cache.logits(rows[:0]).shape == (0, 3)


def test_a_key_is_most_similar_to_itself():
    """Its own key has the weight exp(-beta (1 - 2)), the largest there is."""
    cache = golden()
    cache.labels = torch.tensor([1, 0, 1])
    added = cache.logits(KEYS[1:2])[0, 0] - 100 * KEYS[1, 0]
    torch.testing.assert_close(added, torch.tensor(0.3 * exp(1.0)), rtol=1e-4, atol=1e-4)
    same = TFUP(W)
    same.keys, same.labels = KEYS[:1].repeat(3, 1), LABELS  # no key is nearer than another: all are the nearest
    assert same.logits(ROWS).isfinite().all()


def test_half_precision_and_single_precision_agree():
    rows, _, names = clusters()
    half = rows.half()
    expected = TFUP(names.half().float()).fit(half.float())
    found = TFUP(names.half()).fit(half)
    assert torch.equal(found.rows, expected.rows) and found.logits(half).dtype == torch.float32
    assert torch.equal(found.logits(half), expected.logits(half.float()))
    double = TFUP(names).fit(rows.double())
    assert double.logits(rows.double()).dtype == torch.float64
    torch.testing.assert_close(double.logits(rows), TFUP(names).fit(rows).logits(rows), rtol=1e-5, atol=1e-4)
    wide = TFUPT(names, TFUPTConfig(epochs=2, first=1)).double().fit(rows, rows)  # rows follow the adapters
    assert wide.logits(rows).dtype == torch.float64
    sure = TFUP(W, sharpness=1000.0).fit(torch.eye(2).repeat(3, 1).half())  # p of 0 and 1 in half precision
    assert sure.logits(torch.eye(2).half()).isfinite().all()


def test_bad_input_of_the_cache_is_refused():
    rows, _, names = clusters(n=12)
    nan = rows.clone()
    nan[3, 2] = torch.nan
    for call, message in (
        (lambda: TFUP(names).logits(rows), r"the cache is empty: call fit"),
        (lambda: TFUP(names).fit(rows[:2]), "2 rows, fewer than the 3 classes"),
        (lambda: TFUP(names).fit(nan), "features have 1 rows with nan"),
        (lambda: TFUP(names).fit(rows).logits(nan), "features have 1 rows with nan"),
        (lambda: TFUP(names).fit(rows[:, :5]), r"shape \(12, 5\), but the classes have 8"),
        (lambda: TFUP(names * torch.inf), "classes have 3 rows with nan or inf"),
        (lambda: TFUP(names[:1]), "for each of two or more"),
        (lambda: TFUP(names, alpha=-1.0), r"alpha is -1.0: choose a number in \[0, inf\)"),
        (lambda: TFUP(names, count=0), "count is 0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_adapters_start_as_zero_shot_classification():
    rows, _, names = clusters()
    model, f = TFUPT(names), F.normalize(rows)
    plain = 100 * f @ F.normalize(names).T
    added = F.relu(F.relu(f @ model.down.T) @ model.up.T)
    assert model.down.shape == (2, 8) and model.up.shape == (8, 2) and added.abs().sum() > 0
    expected = 100 * F.normalize(0.8 * f + 0.2 * added) @ F.normalize(names).T
    torch.testing.assert_close(model.logits(rows), expected)
    with torch.no_grad():
        model.up.zero_()
    torch.testing.assert_close(model.logits(rows), plain)
    with torch.no_grad():
        model.residual.copy_(names.flip(0))
    torch.testing.assert_close(model.logits(rows), 100 * f @ F.normalize(names + names.flip(0)).T)


def test_the_later_loss_is_of_certain_rows_and_of_the_mean_softmax():
    rows, _, names = clusters(noise=0.6)
    model = TFUPT(names, TFUPTConfig(threshold=0.99))
    weak, strong = F.normalize(rows), F.normalize(rows.flip(1))
    model.cache.fit(rows)
    found, kept = model.loss(weak, strong)
    p = model.cache.scored(model.images(weak), model.classes()).softmax(-1)
    sure = p.max(-1).values > 0.99
    assert 0 < kept == int(sure.sum()) < len(rows)
    logits = model(strong)
    m = logits.softmax(-1).mean(0)
    ce = -logits.log_softmax(-1)[sure, p.argmax(-1)[sure]].mean()
    torch.testing.assert_close(found, ce + 0.3 * (m * (m + 1e-6).log()).sum())
    none, kept = TFUPT(names, TFUPTConfig(threshold=1.0)), 0
    none.cache.fit(rows)
    found, kept = none.loss(weak, strong)
    m = none(strong).softmax(-1).mean(0)
    assert kept == 0
    torch.testing.assert_close(found, 0.3 * (m * (m + 1e-6).log()).sum())


def test_the_mean_softmax_wants_to_be_uniform():
    """The term is least, -log C, where the mean prediction is uniform, and 0 where one class takes all."""
    from hf_xent.classes.marginal_entropy import marginal

    even = torch.eye(4) * 50
    torch.testing.assert_close(marginal(even), torch.tensor(-log(4)), atol=1e-4, rtol=0)
    draw = torch.Generator().manual_seed(0)
    assert all(marginal(3 * torch.randn(6, 4, generator=draw)) > -log(4) - 1e-4 for _ in range(20))
    torch.testing.assert_close(marginal(even[:1].repeat(4, 1)), torch.tensor(0.0), atol=1e-4, rtol=0)
    toy = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).log()
    torch.testing.assert_close(0.3 * marginal(toy), torch.tensor(-0.201903), atol=1e-6, rtol=0)


def test_training_learns_without_labels_and_follows_its_seed():
    rows, labels, names = clusters(n=240, noise=0.2)
    draw = torch.Generator().manual_seed(1)
    strong = rows + 0.2 * torch.randn(2, *rows.shape, generator=draw)
    config = TFUPTConfig(epochs=8, first=2, batch_size=100)
    model = TFUPT(names, config).fit(rows, strong)
    before = (TFUPT(names, TFUPTConfig(image=0.0)).predict(rows) == labels).float().mean()
    after = (model.predict(rows) == labels).float().mean()
    assert after > before + 0.05
    assert len(model.history) == 8 and all(0 <= epoch["share"] <= 1 for epoch in model.history)
    again = TFUPT(names, config).fit(rows, strong)
    assert torch.equal(again.logits(rows), model.logits(rows))
    other = TFUPT(names, TFUPTConfig(epochs=8, first=2, batch_size=100, seed=1)).fit(rows, strong)
    assert not torch.equal(other.logits(rows), model.logits(rows))
    still = TFUPT(names, TFUPTConfig(epochs=3, first=1, lr=0.0)).fit(rows, strong[0])
    assert torch.equal(still.logits(rows), TFUPT(names).logits(rows))


def test_parts_differ_by_one_row_at_most():
    model = TFUPT(W, TFUPTConfig(batch_size=4))
    parts = list(model._parts(13, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [4, 3, 3, 3]
    assert sorted(torch.cat(parts).tolist()) == list(range(13))


def test_adapters_are_saved_and_loaded(tmp_path):
    rows, _, names = clusters()
    model = TFUPT(names, TFUPTConfig(epochs=2, first=1, text=0.4)).fit(rows, rows)
    file = model.save(tmp_path / "adapters.safetensors")
    found = TFUPT.load(file)
    assert found.config == model.config and torch.equal(found.logits(rows), model.logits(rows))
    assert model.save(file) == file and [path.name for path in tmp_path.iterdir()] == [file.name]
    (tmp_path / "other").write_text("no adapters")
    for bad in ("other", "absent"):
        with pytest.raises(ValueError, match=r"choose a file that TFUPT\.save has written") as caught:
            TFUPT.load(tmp_path / bad)
        assert "\n" not in str(caught.value)


def test_bad_input_of_training_is_refused():
    rows, _, names = clusters(n=12)
    nan = rows.clone()
    nan[0] = torch.inf
    for call, message in (
        (lambda: TFUPT(names).fit(rows, rows[:5]), "give views of the same rows"),
        (lambda: TFUPT(names).fit(rows, rows[None].repeat(0, 1, 1)), "give views of the same rows"),
        (lambda: TFUPT(names).fit(rows, nan), "strong have 1 rows with nan or inf"),
        (lambda: TFUPT(names).fit(nan, rows), "weak have 1 rows with nan or inf"),
        (lambda: TFUPT(names).fit(rows[:2], rows[:2]), "2 rows, fewer than the 3 classes"),
        (lambda: TFUPT(names).logits(rows[:, :3]), "but the classes have 8 numbers"),
        (lambda: TFUPTConfig(batch_size=0), "batch_size is 0"),
        (lambda: TFUPTConfig(epochs=3), "first is 5, but there are 3 epochs"),
        (lambda: TFUPTConfig(threshold=2.0), "threshold is 2.0"),
        (lambda: TFUPTConfig(text=1.0), "text is 1.0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_images_of_a_two_tower_model():
    """A random CLIP: images of three kinds by the names of classes, from pixels to predictions."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 90, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**size, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    names = class_texts(clip, tiny_tokenizer(), ["fox", "lazy dog", "over"], ["the {}", "{} jumps"], normalize=False)
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 3, 8, 8, generator=draw).repeat(10, 1, 1, 1)
    images = kinds + 0.1 * torch.randn(kinds.shape, generator=draw)
    with torch.no_grad():
        weak = features(clip, {"pixel_values": images})
        strong = features(clip, {"pixel_values": images.flip(-1)})
    assert TFUP(names).fit(weak).logits(weak).shape == (30, 3)
    model = TFUPT(names, TFUPTConfig(epochs=2, first=1)).fit(weak, strong)
    assert model.logits(weak).isfinite().all() and model.residual.abs().sum() > 0


def test_the_example_classifies_documents_by_names(tmp_path, monkeypatch, without_progress_bars):
    """Articles of a made-up encyclopedia and a tiny encoder: every arm, and a second call reads and runs nothing."""
    import datasets

    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    draw = random.Random(0)
    rows = [
        {"title": str(i), "text": " ".join(draw.choices(words, k=9)), "topic": ["Uncategorized", "Dog", "Arts"][i % 3]}
        for i in range(120)
    ]
    monkeypatch.setattr("hf_xent.data.load", lambda name, **options: datasets.Dataset.from_list(rows))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=90, **shape)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    example = runpy.run_path(str(EXAMPLES / "training_free.py"))
    found = example["main"](str(tmp_path / "encoder"), count=30, seeds=1, output=tmp_path / "out")
    assert set(found) == set(example["ARMS"]) and all(0 <= rows[0]["accuracy"] <= 1 for rows in found.values())
    monkeypatch.setattr("hf_xent.data.load", None)
    assert example["main"](str(tmp_path / "encoder"), count=30, seeds=1, output=tmp_path / "out") == found
    from topics import topics

    monkeypatch.setattr("hf_xent.data.load", lambda name, **options: datasets.Dataset.from_list(rows))
    parts = [topics(seed, 100, held=held) for seed, held in ((0, False), (1, False), (0, True))]
    assert parts[0][2] == ["arts", "dog"] and len(parts[0][0]) + len(parts[2][0]) == 80
    assert sorted(parts[0][0]) == sorted(parts[1][0]) and parts[0][0] != parts[1][0]  # a seed draws from one half alone
    topic = {row["text"]: row["topic"].lower() for row in rows}
    assert all(topic[text] == parts[0][2][label] for text, label in zip(*parts[0][:2], strict=True))
