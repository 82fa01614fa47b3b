"""Attacks against closed forms of linear models, APGD against a loop in numpy, and what every attack keeps to."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hf_xent.robust import APGD, ATTACKS, PGD, PMA, Ball, ascend, attack, get
from hf_xent.robust.apgd import Adaptive, checkpoints, dlr, dlr_towards
from hf_xent.robust.base import margins, shares
from hf_xent.robust.inputs import Target, settled
from hf_xent.robust.pma import probabilities, sizes

METHODS = ("pgd", "pma", "pma:restarts=2, towards=False", "apgd", "apgd:loss=dlr", "apgd:loss=targeted", "pma_plus")
PLAIN = SimpleNamespace(image_mean=[0.5, 0.4], image_std=[0.25, 0.2])
"""A processor of images of two channels."""


class Linear(nn.Module):
    """z = W x + b, of images or of rows of numbers."""

    def __init__(self, weight, bias=0.0, curve=0.0):
        super().__init__()
        self.weight, self.curve = nn.Parameter(weight), curve
        self.register_buffer("bias", torch.as_tensor(bias, dtype=weight.dtype))

    def forward(self, pixel_values=None, input_values=None):
        x = (pixel_values if input_values is None else input_values).flatten(1).to(self.weight.dtype)
        x = x + self.curve * torch.sin(3 * x)
        return SimpleNamespace(logits=x @ self.weight.T + self.bias)


def images(classes=4, rows=9, dtype=torch.float32, curve=0.0, seed=0):
    """A linear model, images within the range of `PLAIN`, and the model's own classes of them."""
    torch.manual_seed(seed)
    model = Linear(torch.randn(classes, 2 * 9, dtype=dtype), curve=curve)
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 2, 1, 1) for v in (PLAIN.image_mean, PLAIN.image_std))
    x = (torch.rand(rows, 2, 3, 3, dtype=dtype) - mean) / std
    return model, x, model(pixel_values=x).logits.argmax(-1)


def vectors(classes, rows=7, size=12, seed=0):
    """A target in float64 of a linear model without bounds, with the labels that it decides for."""
    torch.manual_seed(seed)
    model = Linear(torch.randn(classes, size, dtype=torch.float64))
    x = torch.randn(rows, size, dtype=torch.float64)
    labels = model(input_values=x).logits.argmax(-1)
    return Target(model, {"input_values": x}, "input_values", x, labels), x, labels


# Closed forms


def test_two_classes_and_the_largest_change():
    """sup over the ball of the change of the logit difference is radius |w_0 - w_1|_1, and in length radius |.|_2."""
    target, x, _ = vectors(2)
    every, difference = torch.arange(len(x)), target.model.weight.detach().diff(dim=0)
    before = target.logits(x, every).detach() @ torch.tensor([1.0, -1], dtype=x.dtype)

    def objective(step, x, rows):
        return target.logits(x, rows) @ torch.tensor([1.0, -1], dtype=x.dtype) - before[rows], None

    for norm, dual in (("inf", 1), ("2", 2)):
        ball = Ball(0.3, norm)
        start = ball.start(x, torch.Generator().manual_seed(0))
        found = ascend(objective, x, ball, [0.2] * 20, start, best=True)
        reached = objective(0, found.x, every)[0].detach()
        torch.testing.assert_close(reached, torch.full_like(reached, 0.3 * float(difference.norm(p=dual))))


def test_the_largest_change_of_margins_is_a_singular_value():
    """Of n classes and an L2 ball: radius sigma_max(A), where the rows of A are w_y - w_k."""
    target, x, labels = vectors(5, rows=6)
    before = target.logits(x, torch.arange(len(x))).detach()

    def objective(step, moved, rows):
        change = target.logits(moved, rows) - before[rows]
        mine = change.gather(1, labels[rows, None])
        return ((mine - change).square().sum(1) + 1e-12).sqrt(), None

    ball = Ball(0.5, "2")
    start = ball.start(x, torch.Generator().manual_seed(0))
    found = ascend(objective, x, ball, [0.5] * 60, start, best=True)
    reached = objective(0, found.x, torch.arange(len(x)))[0].detach()
    weight = target.model.weight.detach()
    largest = torch.stack([torch.linalg.matrix_norm(weight[y] - weight, ord=2) for y in labels])
    assert (reached <= 0.5 * largest * (1 + 1e-6)).all()
    assert (reached >= 0.99 * 0.5 * largest).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_model_of_two_classes_is_attacked_as_well_as_can_be(method):
    """A row flips where its margin is below epsilon |w_y - w_k|_1; else its margin falls by exactly that."""
    target, x, labels = vectors(2, rows=60)
    width = float(target.model.weight.detach().diff(dim=0).norm(p=1))
    every = torch.arange(len(x))
    before = margins(target.logits(x, every), labels).detach()
    radius = float(before.median()) / width * (1 + 1e-9)
    found = get(method).find(target, Ball(radius), 20, 0)
    assert found.done.tolist() == (before - radius * width < 0).tolist()
    assert 0 < found.done.sum() < len(x)
    left = ~found.done
    after = margins(target.logits(found.x, every), labels).detach()
    torch.testing.assert_close(after[left], (before - radius * width)[left])


# The margin of probabilities


def test_the_margin_of_probabilities_has_the_sign_of_that_of_logits():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 5, dtype=torch.float64, generator=generator) * 5
    labels = torch.randint(5, (2000,), generator=generator)
    of_probabilities, of_logits = margins(z.softmax(-1), labels), margins(z, labels)
    assert ((of_probabilities < 0) == (of_logits < 0)).all()
    assert 0 < (of_logits < 0).sum() < 2000


def test_the_margin_of_probabilities_by_hand():
    q = torch.tensor([[0.5, 0.3, 0.2]] * 2)
    assert (-margins(q, torch.tensor([0, 2]))).tolist() == pytest.approx([-0.2, 0.3])


def test_gradients_of_probabilities_point_the_same_way():
    """They are those of a and b by autograd, divided by 1 - a."""
    z = (torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    labels = torch.arange(100) % 4
    q = z.softmax(-1)
    a = q.gather(1, labels[:, None]).squeeze(1)
    b = q.scatter(1, labels[:, None], -1.0).amax(1)
    for plain, ours in zip((a, b, b - a), (*probabilities(z, labels), None), strict=True):
        value = probabilities(z, labels)[1] - probabilities(z, labels)[0] if ours is None else ours
        (expected,) = torch.autograd.grad((plain / (1 - a).detach()).sum(), z, retain_graph=True)
        (found,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_do_not_vanish_where_a_model_is_sure():
    """At a margin of 200 the probabilities' own gradients are zero in float32."""
    z = torch.tensor([[200.0, 0.0, -1.0]], requires_grad=True)
    a, b = probabilities(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad((b - a).sum(), z)
    assert gradient[0, 0] < -0.5
    assert gradient[0, 1] > 0.5


def test_sizes_are_those_of_the_schedule():
    """epsilon (1 + cos(pi (i - 1) / (S / 2))) up to i = S / 2, then from i - S / 2 - 1."""
    found = sizes(0.1, 100)
    for i in (0, 1, 2, 25, 50):
        assert found[i] == pytest.approx(0.1 * (1 + math.cos(math.pi * (i - 1) / 50)))
    for i in (51, 52, 99):
        assert found[i] == pytest.approx(0.1 * (1 + math.cos(math.pi * (i - 51) / 50)))
    assert found[1] == found[51] == pytest.approx(0.2)
    assert len(found) == 100
    assert min(found) >= 0


def test_phases_of_the_margin_attack():
    """Step 0 goes towards the label, then -a in phase 0 and b in phase 1, then b - a: seen in the steps of a model
    of three classes in which a and b move along different inputs.
    """
    weight = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[5.0, 1.0, 0.0]], dtype=torch.float64)
    target, seen = Target(Linear(weight), {}, "input_values", x, torch.tensor([0])), []
    logits = target.logits
    target.logits = lambda x, rows: (seen.append(x.detach().clone()), logits(x, rows))[1]
    PMA(towards=False).find(target, Ball(1e-3), 16, 0)
    assert (seen[1] > x)[0].tolist() == [False, True, True], "without the step towards the label"
    seen.clear()
    PMA().find(target, Ball(1e-3), 16, 0)
    first, second = torch.cat(seen[:9]), torch.cat(seen[9:])
    assert len(first) == len(second) == 9  # 8 steps and a look at the last point
    for points in (first, second):
        assert (points[1] > x[0]).tolist() == [True, False, False]
        assert (points[-1] > x[0]).tolist() == [False, True, True]
    assert (first[2] - first[1]).sign().tolist() == [-1, 1, 1]  # a falls: both others rise
    last = (second[2] - second[1]).tolist()
    assert last[0] < 0 < last[1]
    assert last[2] <= 0  # b rises: the third class falls, or is as low as it can be


# APGD


def reference_apgd(f, gradient, start, center, radius, steps):
    """Algorithm 1 of arXiv:2003.01690 for one row and the maximum norm, in numpy: its points, and where it halves."""
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(round(each * steps, 9)) for each in p]

    def clip(x):
        return np.clip(x, center - radius, center + radius)

    size = 2 * radius
    best, base, rises, previous, last = start, f(start), 0, (2 * radius, f(start)), 0
    points, halvings, sources = [start], [], [start]
    for k in range(steps):
        source = sources[-1]
        z = clip(source + size * np.sign(gradient(source)))
        if k:
            z = clip(source + 0.75 * (z - source) + 0.25 * (source - sources[-2]))
        rises += f(z) > f(source)
        if f(z) > base:
            best, base = z, f(z)
        points.append(z)
        sources.append(z)
        if k + 1 in w:
            stuck = previous == (size, base)
            previous = (size, base)
            if rises < 0.75 * (k + 1 - last) or stuck:
                size /= 2
                halvings.append(k + 1)
                sources[-1] = best
            rises, last = 0, k + 1
    return np.array(points), halvings


@pytest.mark.parametrize(("steps", "scale"), [(100, 1.0), (37, 1.0), (100, 30.0), (5, 1.0)])
def test_apgd_follows_its_algorithm(steps, scale):
    """On a concave parabola whose top is within the ball, by a loop in numpy."""
    generator = np.random.default_rng(0)
    center, top = generator.normal(size=6), 0.03 * generator.normal(size=6)
    curvature = scale * np.exp(generator.normal(size=6))
    start = center + 0.1 * generator.uniform(-1, 1, 6)

    def f(x):
        return -(curvature * (x - center - top) ** 2).sum()

    points, halvings = reference_apgd(f, lambda x: -2 * curvature * (x - center - top), start, center, 0.1, steps)
    seen = []
    weights, aim = torch.tensor(curvature), torch.tensor(center + top)

    def objective(step, x, rows):
        seen.append(x.detach().clone())
        return -(weights * (x - aim) ** 2).sum(1), None

    walk = Adaptive(steps, 0.1)
    row = torch.tensor(center)[None]
    found = ascend(objective, row, Ball(0.1), walk, torch.tensor(start)[None], best=True)
    np.testing.assert_allclose(torch.cat(seen).numpy(), points, rtol=0, atol=1e-12)
    assert float(walk.state["size"]) == pytest.approx(0.2 / 2 ** len([w for w in halvings if w < steps]))
    assert len(halvings) >= (2 if steps > 10 else 0)
    np.testing.assert_allclose(found.x[0].numpy(), max(points, key=f), atol=1e-12)


def test_checkpoints_of_a_hundred_steps():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_ratios_of_logits_by_hand():
    z = torch.tensor([[5.0, 3.0, 1.0, 0.0], [1.0, 5.0, 4.0, 2.0]])
    labels, classes = torch.tensor([0, 0]), torch.tensor([2, 1])
    assert dlr(z, labels, labels).tolist() == pytest.approx([-(5 - 3) / (5 - 1), -(1 - 5) / (5 - 2)])
    expected = [-(5 - 1) / (5 - 0.5), -(1 - 5) / (5 - 1.5)]
    assert dlr_towards(z, labels, classes).tolist() == pytest.approx(expected)
    assert dlr(z[:, :2], labels, labels).tolist() == [-2, 4], "the margin, where there is no third class"
    assert dlr_towards(z[:, :3], labels, classes).tolist() == [-4, 4]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", ["apgd:loss=dlr", "apgd:loss=targeted", "pma_plus"])
def test_few_classes(classes, method):
    target = vectors(classes)[0]
    assert get(method).find(target, Ball(10.0), 12, 0).done.all()
    assert not get(method).find(target, Ball(1e-6), 12, 0).done.any()


# What every attack keeps to


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("norm", "epsilon"), [("inf", 0.04), ("2", 0.15)])
def test_points_are_in_the_ball_and_success_is_that_of_what_is_returned(method, norm, epsilon):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, x, _ = images(curve=0.3, rows=12)
        x = x.to(dtype)
        labels = model(pixel_values=x).logits.argmax(-1)
        found = attack(model, {"pixel_values": x}, labels, epsilon, 20, method, norm=norm, processor=PLAIN)
        assert found.inputs.dtype == dtype
        assert (model(pixel_values=found.inputs).logits.argmax(-1) != labels).tolist() == found.flipped.tolist()
        assert 0 < found.flipped.sum() < 12
        std, mean = (torch.tensor(v).double().view(1, 2, 1, 1) for v in (PLAIN.image_std, PLAIN.image_mean))
        pixels, before = (value.double() * std + mean for value in (found.inputs, x))
        change = (pixels - before).flatten(1)
        size = change.abs().amax(1) if norm == "inf" else change.norm(dim=1)
        assert (size <= epsilon * (1 + 1e-5)).all()
        assert (pixels >= before.amin((0, 2, 3), keepdim=True).clamp(max=0) - 1e-6).all()
        assert (pixels <= before.amax((0, 2, 3), keepdim=True).clamp(min=1) + 1e-6).all()
        assert float(size.max()) > 0.9 * epsilon


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_attacked_as_it_is_alone(method):
    model, x, labels = images(curve=0.3, dtype=torch.float64, rows=8)
    whole = attack(model, {"pixel_values": x}, labels, 0.03, 20, method, processor=PLAIN)
    assert 0 < whole.flipped.sum() < 8
    for i in range(8):
        alone = attack(model, {"pixel_values": x[i : i + 1]}, labels[i : i + 1], 0.03, 20, method, processor=PLAIN)
        torch.testing.assert_close(alone.inputs[0], whole.inputs[i], rtol=0, atol=1e-9)
        assert alone.flipped[0] == whole.flipped[i]


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_leave_change_nothing_but_the_work(method):
    model, x, labels = images(curve=0.3, rows=20)
    found, slow = (
        attack(model, {"pixel_values": x}, labels, 0.04, 24, get(method, **more), processor=PLAIN)
        for more in ({}, {"leave": False})
    )
    assert found.flipped.tolist() == slow.flipped.tolist()
    torch.testing.assert_close(found.inputs, slow.inputs, rtol=0, atol=1e-5)
    assert 0 < found.flipped.sum() < 20
    assert found.passes < slow.passes
    assert slow.passes >= 20 * 25 + 20


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_shared(method):
    """Backward passes of a row are at most the steps, whatever the number of runs."""
    model, x, labels = images(rows=5)
    backward = []
    original = torch.autograd.grad

    def counted(values, *args, **options):
        backward.append(1)
        return original(values, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        found = attack(model, {"pixel_values": x}, labels, 1e-5, 23, method, processor=PLAIN)
    assert len(backward) == 23
    assert not found.flipped.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(method):
    model, x, labels = images(curve=0.3)
    runs = [attack(model, {"pixel_values": x}, labels, 0.03, 10, method, seed=s, processor=PLAIN) for s in (0, 0, 1)]
    assert torch.equal(runs[0].inputs, runs[1].inputs)
    assert not torch.equal(runs[0].inputs, runs[2].inputs)


def test_restarts_find_no_less():
    model, x, labels = images(curve=0.5, rows=40, seed=3)
    once = attack(model, {"pixel_values": x}, labels, 0.02, 20, "pma", processor=PLAIN)
    thrice = attack(model, {"pixel_values": x}, labels, 0.02, 60, "pma:restarts=3", processor=PLAIN)
    assert (thrice.flipped | ~once.flipped).all()


def test_shares_of_steps():
    assert shares(10, 3) == [4, 3, 3]
    assert shares(2, 3) == [1, 1]


# Balls


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("vector", [None, 1])
@pytest.mark.parametrize(("seed", "size"), [(0, 1e-3), (1, 0.1), (2, 1.0), (3, 10.0)])
def test_starts_and_projections_are_in_the_ball(norm, vector, seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, generator=generator).clamp(-1, 1)
    mask = torch.rand(3, 4, 1, generator=generator) > 0.3
    unit = torch.rand(3, 1, 1, generator=generator) + 0.1
    ball = Ball(0.2, norm, unit, -1.0, torch.full((1, 1, 5), 1.0), mask, vector)
    for point in (ball.start(x, generator), ball.project(x + size * torch.randn(x.shape, generator=generator), x)):
        assert (ball.distance(point, x) <= 1 + 1e-5).all()
        assert point.abs().max() <= 1
        assert torch.equal(point.where(~mask, 0), x.where(~mask, 0))
        again = ball.project(point, x)
        torch.testing.assert_close(again, point, rtol=1e-5, atol=1e-6)
    some = torch.tensor([2, 0])
    torch.testing.assert_close(ball.rows(some).project(x[some] + size, x[some]), ball.project(x + size, x)[some])


def test_starts_fill_the_ball():
    """In two dimensions a quarter of the points is within half the radius."""
    x = torch.zeros(4000, 2)
    lengths = Ball(2.0, "2").start(x, torch.Generator().manual_seed(0)).norm(dim=1)
    assert float((lengths < 1).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_a_step_of_a_tiny_gradient_has_its_length():
    ball = Ball(1.0, "2")
    gradient = torch.tensor([[3e-38, 4e-38], [0.0, 0.0], [float("nan"), 1.0]])
    torch.testing.assert_close(ball.step(gradient, 0.5), torch.tensor([[0.3, 0.4], [0, 0], [0, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_goes_towards_the_center(dtype):
    generator = torch.Generator().manual_seed(0)
    center = (torch.randn(5000, generator=generator) * 2).to(dtype)
    center[:9] = 0
    x = center.float() + 0.2 * torch.randn(5000, generator=generator)
    x[5:12], x[:2] = center[5:12].float(), torch.tensor([1e-9, -1e-9])  # which float16 rounds to zero
    found = settled(x, center)
    assert found.dtype == dtype
    assert (found.float() >= torch.minimum(center.float(), x)).all()
    assert (found.float() <= torch.maximum(center.float(), x)).all()
    assert ((found.float() - x).abs() <= torch.finfo(dtype).eps * x.abs() + 1e-7).all(), "by one spacing at most"
    assert (found.float() != x.to(dtype).float()).any()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"radius": 0}, "radius is 0: choose a number above 0"),
        ({"radius": math.nan}, "radius is nan"),
        ({"radius": 1, "norm": "1"}, "norm is '1': choose inf or 2"),
    ],
)
def test_bad_balls_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Ball(**fields)


def test_a_tensor_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match="unit has 1 dimensions, the input 2"):
        Ball(1.0, unit=torch.ones(3)).start(torch.zeros(2, 3))


def test_an_objective_without_the_inputs_is_refused():
    x = torch.zeros(2, 3)
    for values in (torch.zeros(2), torch.zeros(2, requires_grad=True)):
        with pytest.raises(ValueError, match="does not depend on the inputs"):
            ascend(lambda step, x, rows, values=values: (values, None), x, Ball(1.0), [1.0], x)


# Options


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("nonesuch", "attack is 'nonesuch': choose one of pgd, pma, apgd, pma_plus"),
        ("pgd:size=0", "size is 0"),
        ("pma:restarts=0", "restarts is 0"),
        ("apgd:loss=none", "loss is 'none': choose ce, dlr or targeted"),
        ("apgd:targets=1.5", "targets is 1.5"),
        ("pma_plus:share=1", "share is 1"),
        ("pma_plus:targets=0", "targets is 0"),
        ("pgd:leave=2", "leave is 2"),
    ],
)
def test_bad_options_are_refused(method, reason):
    with pytest.raises(ValueError, match=reason):
        get(method)


def test_the_registry_offers_each_attack():
    assert [type(get(name)).__name__ for name in ATTACKS] == ["PGD", "PMA", "APGD", "PMAPlus"]
    assert get(PGD(size=2)).size == 2
    assert APGD().loss == "ce"
    for row in ATTACKS.table():
        assert row["source"]
        assert row["summary"]
        assert all(row["help"].values())
