"""RePRI: the toy's golden values, the 49 steps against a loop with autograd, tasks of a batch, padding, and maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTModel,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_xent.adapt import RePRI, feature_maps
from hf_xent.adapt.maps import on_grid

QUERY = torch.tensor([[[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]]], dtype=torch.float64)
SUPPORT = torch.tensor([[[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]]], dtype=torch.float64)
LABELS = torch.tensor([[1, 1, 0, 0]])
COLOURS = nn.AvgPool2d(2)  # a function from images to maps: their mean colours


def expected(support, labels, query, shots=1, prior=None, kl=None, entropy=None):
    """One task, as the paper's loop has it: p and w, from features that are used as they are."""
    w = support[labels == 1].mean(0).requires_grad_()
    b = (20 * F.cosine_similarity(query, w, dim=-1)).mean().detach().requires_grad_()

    def share(p):
        return torch.stack([1 - p.mean(), p.mean()])

    def p_of(f):
        return torch.sigmoid(20 * F.cosine_similarity(f, w[None], dim=-1) - b)

    pi = share(p_of(query).detach()) if prior is None else torch.tensor([1 - prior, prior]).double()
    kl, entropy = (1 / shots if weight is None else weight for weight in (kl, entropy))
    optimizer = torch.optim.SGD([w, b], lr=0.025)
    for iteration in range(1, 50):
        p, known = p_of(query), labels >= 0
        loss = F.binary_cross_entropy(p_of(support[known]), labels[known].double())
        loss = loss + kl * (share(p) * (share(p) / pi).log()).sum()
        loss = loss - entropy * (p * p.log() + (1 - p) * (1 - p).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration + 1 == 10 and prior is None and kl:
            pi, kl = share(p_of(query).detach()), kl + 1
    return p_of(query).detach(), w.detach()


@pytest.fixture
def tasks():
    """Three tasks with features of 6 numbers: support [3, 7, 6], labels, query [3, 9, 6]."""
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, -100, 0]])
    center = torch.randn(3, 1, 6, dtype=torch.float64)
    support = torch.randn(3, 7, 6, dtype=torch.float64) + (labels == 1)[..., None] * center
    query = torch.randn(3, 9, 6, dtype=torch.float64) + (torch.rand(3, 9, 1) < 0.4) * center
    return support, labels, query


def test_the_toy_starts_with_the_golden_values():
    episode = RePRI(steps=0, normalize=False).fit(SUPPORT, LABELS, QUERY)

    def close(found, values, **tolerance):
        return torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), **tolerance)

    close(episode.w, [[0.95, 0.05]])
    close(episode.b, [12.614120], rtol=0, atol=5e-7)
    close(episode.probabilities(), [[0.999363, 0.981916, 9.5e-6, 0.552366]], rtol=0, atol=5e-7)
    close(episode.prior, [0.633414], rtol=0, atol=5e-7)
    terms = episode.terms()
    close(terms["ce"], [3.4335e-4], rtol=0, atol=5e-9)
    close(terms["entropy"], [0.195896], rtol=0, atol=5e-7)
    close(terms["kl"], [0.0], rtol=0, atol=1e-9)


def test_kl_of_the_toy(monkeypatch):
    episode = RePRI(steps=0).fit(SUPPORT, LABELS, QUERY, prior=0.6)
    monkeypatch.setattr(episode, "shares", lambda: (torch.tensor([0.3]), torch.tensor([0.7])))
    assert episode.terms()["kl"].item() == pytest.approx(0.021601, abs=5e-7)


@pytest.mark.parametrize(
    "given",
    [{}, {"shots": 5}, {"prior": 0.2}, {"kl": 0}, {"entropy": 0}, {"kl": 0.0, "entropy": 0.0}, {"kl": 2, "shots": 3}],
    ids=str,
)
def test_every_step_is_that_of_the_loop(tasks, given):
    """Also of the refresh after nine steps, which is there only for the KL of a share that is estimated."""
    options = {name: given[name] for name in ("kl", "entropy") if name in given}
    call = {name: given[name] for name in ("prior", "shots") if name in given}
    episode = RePRI(normalize=False, **options).fit(*tasks, **call)
    for row, task in enumerate(zip(*tasks, strict=True)):
        p, w = expected(*task, **given)
        torch.testing.assert_close(episode.probabilities()[row], p, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(episode.w[row], w, rtol=1e-7, atol=1e-7)
    same = RePRI(**options).fit(*tasks, **call)
    unit = F.normalize(tasks[0], dim=-1), tasks[1], F.normalize(tasks[2], dim=-1)
    p, _ = expected(*(part[1] for part in unit), **given)
    torch.testing.assert_close(same.probabilities()[1], p, rtol=1e-7, atol=1e-7)


def test_the_refresh_matters(tasks):
    """Otherwise the test above would not see it."""
    with_it, without = (RePRI(refresh=refresh).fit_predict(*tasks) for refresh in (9, 0))
    assert (with_it - without).abs().max() > 1e-4


def test_gradient_is_that_of_the_terms(tasks):
    """By autograd of `terms`, whose pi is a number and has no gradient."""
    episode = RePRI(steps=3).fit(*tasks)
    by_w, by_b = episode.gradient(kl=0.7, entropy=0.4)
    episode.w, episode.b = (part.clone().requires_grad_() for part in (episode.w, episode.b))
    terms = episode.terms()
    assert not episode.prior.requires_grad
    (terms["ce"] + 0.7 * terms["kl"] + 0.4 * terms["entropy"]).sum().backward()
    torch.testing.assert_close((by_w, by_b), (episode.w.grad, episode.b.grad))


def test_gradient_of_kl_is_none_where_the_share_is_pi(tasks):
    episode = RePRI(steps=0).fit(*tasks)  # pi is that of this very classifier
    torch.testing.assert_close(episode.terms()["kl"], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(episode.gradient(5.0, 0.3), episode.gradient(0.0, 0.3), rtol=0, atol=1e-8)


def test_without_the_two_terms_the_query_moves_nothing(tasks):
    """Only cross-entropy of the support does; with one of them, the query counts."""
    episode, other = (RePRI(steps=2).fit(*tasks, prior=0.3) for _ in range(2))
    other.query = other.query.flip(-1)
    torch.testing.assert_close(episode.gradient(0.0, 0.0), other.gradient(0.0, 0.0), rtol=0, atol=0)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        assert (episode.gradient(*weights)[0] - other.gradient(*weights)[0]).abs().max() > 1e-3
    start, end = (RePRI(steps=steps, kl=0, entropy=0).fit(*tasks).terms()["ce"] for steps in (0, 49))
    assert (end < start).all()


@pytest.mark.parametrize("steps", [0, 49])
def test_lengths_of_features_do_not_matter(tasks, steps):
    support, labels, query = tasks
    scales = [torch.rand(*part.shape[:2], 1, dtype=torch.float64) * 9 + 0.1 for part in (support, query)]
    found = RePRI(steps=steps).fit_predict(support * scales[0], labels, query * scales[1])
    torch.testing.assert_close(found, RePRI(steps=steps).fit_predict(*tasks))


def test_ragged_tasks_are_those_alone(tasks):
    """Padding may hold anything, also what is not finite."""
    support, labels, query = tasks
    counts, mask = (4, 9, 6), torch.zeros(3, 9, dtype=torch.bool)
    for row, count in enumerate(counts):
        mask[row, :count] = True
        query[row, count:] = torch.nan
    labels[1, :3] = -100
    support[1, :3] = torch.inf
    prior = torch.tensor([0.2, 0.5, 0.7])
    for given in ({}, {"prior": prior}):
        found = RePRI().fit_predict(support, labels, query, mask, **given)
        assert found.isnan().equal(~mask)
        for row, count in enumerate(counts):
            known = labels[row] != -100
            alone = support[row][known], labels[row][known], query[row, :count]
            mine = {"prior": prior[row]} if given else {}
            torch.testing.assert_close(found[row, :count], RePRI().fit_predict(*alone, **mine))


def test_half_precision_is_read_and_not_computed_with(tasks):
    support, labels, query = (part.half() if part.is_floating_point() else part for part in tasks)
    found = RePRI().fit_predict(support, labels, query)
    assert found.dtype == torch.float32
    assert found.equal(RePRI().fit_predict(support.float(), labels, query.float()))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert found.equal(RePRI().fit_predict(support, labels, query))


def test_certain_queries_stay_finite():
    """All rows alike, an oracle's share of 0 and of 1, and features of no length."""
    query = torch.cat([QUERY[:, :1].expand(-1, 50, -1), torch.zeros(1, 1, 2, dtype=torch.float64)], 1)
    for prior in (None, 0.0, 1.0):
        assert RePRI(temperature=500).fit_predict(SUPPORT.float(), LABELS, query.float(), prior=prior).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_labels": torch.zeros(1, 4)}, "support_labels of task 0 have no row of the foreground"),
        ({"support_labels": torch.tensor([[1, 255, 0, 0]])}, "support_labels hold 255"),
        ({"support_labels": LABELS[:, :3]}, "give .B, N, D., .B, N. and .B, M, D."),
        ({"query_features": QUERY.expand(2, -1, -1)}, "give .B, N, D., .B, N. and .B, M, D."),
        ({"query_features": QUERY.long()}, "pass floating point numbers"),
        ({"query_features": QUERY * torch.nan}, "query_features are not finite"),
        ({"mask": torch.ones(1, 3)}, "mask has the shape"),
        ({"mask": torch.zeros(1, 4)}, "mask of task 0 have no row that is no padding"),
        ({"prior": 1.2}, "prior is 1.2"),
        ({"prior": torch.tensor([0.2, 0.3])}, "one for each of 1 tasks"),
        ({"shots": 0}, "shots is 0"),
    ],
    ids=str,
)
def test_input_that_is_no_task_is_refused(change, message):
    given = {"support_features": SUPPORT, "support_labels": LABELS, "query_features": QUERY, **change}
    with pytest.raises(ValueError, match=message):
        RePRI().fit_predict(**given)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0}, {"steps": -1}, {"kl": -1}, {"entropy": float("nan")}, {"temperature": -20}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        RePRI(**options)


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
VIT = ViTConfig(image_size=(24, 16), patch_size=4, **TRANSFORMER)
CONVOLUTIONS = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
STAGES = SegformerConfig(depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], num_encoder_blocks=2,
                         sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2])  # fmt: skip


@pytest.mark.parametrize(
    ("model", "size", "layer"),
    [
        (lambda: ViTForImageClassification(VIT), (16, 6, 4), None),
        (lambda: ViTForImageClassification(VIT), (16, 6, 4), 1),
        (lambda: DeiTModel(DeiTConfig(image_size=(24, 16), patch_size=4, **TRANSFORMER)), (16, 6, 4), None),
        (lambda: ResNetForImageClassification(CONVOLUTIONS), (16, 3, 2), None),
        (lambda: ResNetBackbone(CONVOLUTIONS), (16, 3, 2), None),
        (lambda: SegformerForSemanticSegmentation(STAGES), (16, 6, 4), None),
        (lambda: SegformerForSemanticSegmentation(STAGES), (8, 12, 8), 0),
    ],
)
def test_models_have_maps(model, size, layer):
    torch.manual_seed(0)
    model = model().train()
    images = torch.randn(2, 3, 24, 16)
    found = feature_maps(model, images, layer)
    assert found.shape == (2, *size) and model.training
    assert feature_maps(model, images, layer).equal(found), "in evaluation mode"
    alone = feature_maps(model, images[1:], layer)
    torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_grid_of_patches_is_that_of_the_image():
    """Without positions and layers, the token of a patch is its own: one bright patch is one bright cell."""
    model = ViTForImageClassification(ViTConfig(**{**VIT.to_dict(), "num_hidden_layers": 0})).vit
    model.embeddings.position_embeddings.data.zero_()
    images = torch.zeros(1, 3, 24, 16)
    images[..., 8:12, 4:8] = 1
    maps = feature_maps(model, images)
    differs = (maps - maps[..., :1, :1]).abs().amax(1)[0] > 1e-6
    assert differs.nonzero().tolist() == [[2, 1]]


def test_models_without_a_grid_are_refused():
    swin = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    )
    with pytest.raises(ValueError, match="16 tokens for 8 x 8 patches, which are no grid"):
        feature_maps(swin, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="give images as"):
        feature_maps(swin, torch.randn(3, 32, 32))


def test_masks_are_taken_at_the_centres_of_cells():
    mask = torch.zeros(6, 6, dtype=torch.long)
    mask[1, 4] = mask[4, 1] = 1
    mask[5, 5] = -100
    assert on_grid(mask, (2, 2)).tolist() == [[0, 1], [1, 0]]


def test_segment_is_fit_predict_on_the_cells():
    """With colours as features: the red square of the support is found in the query, at the size of the image."""
    torch.manual_seed(0)
    support, masks = torch.rand(2, 3, 3, 8, 8) * 0.3, torch.zeros(2, 3, 8, 8, dtype=torch.long)
    support[..., 0, 2:6, 2:6] += 1
    masks[..., 2:6, 2:6] = 1
    query = torch.rand(2, 3, 8, 8) * 0.3
    query[:, 0, :4, :4] += 1
    found = RePRI().segment(COLOURS, support, masks, query)
    assert found.shape == (2, 8, 8)
    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[:3, :3] = True
    assert (found[:, truth] > 0.5).all() and (found[:, 5:] < 0.5).all()

    def rows(maps):
        return maps.flatten(-2).transpose(-1, -2)

    flat = rows(COLOURS(support.flatten(0, 1))).reshape(2, 48, 3)
    p = RePRI().fit_predict(flat, masks[..., 1::2, 1::2].flatten(1), rows(COLOURS(query)), shots=3)
    same = F.interpolate(p.logit().reshape(2, 1, 4, 4), (8, 8), mode="bilinear")[:, 0].sigmoid()
    torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-5)


def test_padding_of_a_query_image_changes_nothing():
    torch.manual_seed(0)
    support, masks, query = torch.rand(1, 1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.long), torch.rand(1, 3, 8, 8)
    masks[..., 2:6, 2:6] = 1
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    mask[..., 4:, :] = False
    found = RePRI().segment(COLOURS, support, masks, query, mask)
    assert found.isnan().equal(~mask)
    query[..., 4:, :] = torch.rand(3, 4, 8)
    again = RePRI().segment(COLOURS, support, masks, query, mask)
    torch.testing.assert_close(again, found, equal_nan=True)
    cut = RePRI().segment(COLOURS, support, masks, query[..., :4, :])
    torch.testing.assert_close(found[:, :4], cut)


def test_masks_that_vanish_or_do_not_fit_are_refused():
    images, masks = torch.rand(1, 1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.long)
    masks[..., 0, 0] = 1
    with pytest.raises(ValueError, match=r"no foreground in the cells of the feature map, .2, 2."):
        RePRI().segment(nn.AvgPool2d(4), images, masks, images[:, 0])
    with pytest.raises(ValueError, match=r"give .B, S, C, H, W. and .B, S, H, W."):
        RePRI().segment(nn.AvgPool2d(4), images, masks[:, 0], images[:, 0])
