"""torch.func and double backward of everything that streams: the numbers of dense logits, or torch's own error.

Every loss of the registry is there by itself, against its `reference` on dense logits.
"""

import pytest
import torch
from torch.nn import functional as F

from hf_xent import Head, LazyLogits, linear_cross_entropy, losses, token_logprobs
from hf_xent.losses import LOSSES, CrossEntropy
from hf_xent.losses.targets import TopK
from hf_xent.ops.divergences import stream_divergence
from hf_xent.ops.request import Request
from hf_xent.ops.row_loss import RowLoss, at_ids
from hf_xent.trainers.divergence import noisefit, rdrop

V, D, N = 17, 4, 5


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, HIDDEN, ALONG = double(V, D), double(N, D), double(N, D)
TEACHER = double(N, 3), Head(double(V, 3))
CLASSES, GAIN, ONCE = double(V).exp(), double(V).exp(), double(N, D)
LABELS = torch.tensor([3, -100, 0, 16, 3])
VALID = LABELS != -100


def registered(name):
    loss = losses.get(name).bind(WEIGHT)
    teacher = TEACHER if loss.needs_teacher else None
    # one row of labels, since some losses compare the positions of a sequence
    return lambda h, w: loss(h[None], Head(w), LABELS[None], teacher=teacher and (teacher[0][None], teacher[1]))


def dense(name):
    loss = losses.get(name).bind(WEIGHT)
    teacher = TEACHER[1].logits(TEACHER[0])[VALID]

    def value(h, w):
        rows = (h @ w.T)[VALID]
        return loss.reference(rows, LABELS[VALID], weight=w, teacher=teacher).mean()

    return value


def log_probability_times_entropy(h, w):
    logp, entropy = token_logprobs(h, w, LABELS, temperature=0.7)
    return (logp * entropy).sum()


def its_dense_form(h, w):
    logp = (h @ w.T / 0.7).log_softmax(-1)[VALID]
    return (logp.gather(-1, LABELS[VALID, None]).squeeze(-1) * -(logp.exp() * logp).sum(-1)).sum()


def in_passes(function, *factors):
    return lambda h, w: stream_divergence(function, [h * x for x in factors], Head(w), LABELS, Request())[0]


IDS, FACTORS, POWER = torch.tensor([[0, 5], [1, 2], [16, 3], [4, 9], [2, 0]]), double(N, 2), double(N).exp()


def with_rows(_, logp, ids, factors, power):
    """A loss with constants of every token: token ids and numbers."""
    return {"loss": (at_ids(logp, ids) * factors).sum(-1) + ((1 + power[:, None]) * logp).exp().sum(-1)}


def its_rows(h, w):
    logp = (h @ w.T).log_softmax(-1)
    losses = (logp.gather(-1, IDS) * FACTORS).sum(-1) + (logp.exp() ** (1 + POWER[:, None])).sum(-1)
    return losses[VALID].sum()


def against_entries(name, tail):
    """A loss against the two tokens IDS of a teacher, and its dense form where the others are one class."""
    logp = FACTORS.log_softmax(-1) - 0.5
    target = TopK(IDS, logp, torch.log1p(-logp.exp().sum(-1)), tail)
    objective = losses.get(name)

    def classes(h, w):
        logq = (h @ w.T).log_softmax(-1)
        others = logq.scatter(1, IDS, -torch.inf).logsumexp(-1, keepdim=True)
        student, teacher = (
            torch.cat([logq.gather(1, IDS), others], 1),
            torch.cat([target.logp, target.rest[:, None]], 1),
        )
        return objective.reference(student[VALID], LABELS[VALID], teacher=teacher[VALID]).mean()

    streamed = lambda h, w: objective(h, Head(w), LABELS, teacher=target)  # noqa: E731
    return streamed, classes if tail == "class" else None


def smoothed(h, w):
    return linear_cross_entropy(h, w, LABELS, class_weight=CLASSES, label_smoothing=0.1)


FUNCTIONS = {
    "token_logprobs": (log_probability_times_entropy, its_dense_form),
    "class weights": (
        smoothed,
        lambda h, w: F.cross_entropy(h @ w.T, LABELS, weight=CLASSES, label_smoothing=0.1),
    ),
    "gain": (
        lambda h, w: CrossEntropy()(h, Head(w, gain=GAIN), LABELS),
        lambda h, w: F.cross_entropy(h @ w.T * GAIN, LABELS),
    ),
    "R-Drop": (in_passes(rdrop(), 1.0, 0.9), None),
    "rows of constants": (in_passes(RowLoss(with_rows, ((0, 1.0),), (IDS, FACTORS, POWER)), 1.0), its_rows),
    "a class of all other tokens": against_entries("jsd", "class"),
    "other tokens alike": against_entries("reverse_kl", "uniform"),
    "NoiseFiT": (in_passes(noisefit(), 1.0, 0.9, 1.1), None),
}
# the reference of EISL is of one run of labels, and these are two
CASES = {name: (registered(name), None if name == "eisl" else dense(name)) for name in LOSSES} | FUNCTIONS


def gradient(function, hidden, weight):
    hidden = hidden.clone().requires_grad_()
    return torch.autograd.grad(function(hidden, weight), hidden)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
@pytest.mark.parametrize("name", CASES)
def test_torch_func_and_double_backward(name):
    streamed, plain = CASES[name]
    expected = gradient(plain or streamed, HIDDEN, WEIGHT)
    torch.testing.assert_close(gradient(streamed, HIDDEN, WEIGHT), expected)
    torch.testing.assert_close(torch.func.grad(streamed)(HIDDEN, WEIGHT), expected)
    along = torch.func.jvp(lambda h: streamed(h, WEIGHT), (HIDDEN,), (ALONG,))[1]
    torch.testing.assert_close(along, (expected * ALONG).sum())
    mapped = torch.vmap(streamed, (0, None))(torch.stack([HIDDEN, 2 * HIDDEN]), WEIGHT)
    torch.testing.assert_close(mapped, torch.stack([streamed(HIDDEN, WEIGHT), streamed(2 * HIDDEN, WEIGHT)]))
    if plain is not None:
        torch.testing.assert_close(product(streamed), product(plain))
    else:  # no stop of gradients in these
        step = 1e-5 * ALONG
        slope = (gradient(streamed, HIDDEN + step, WEIGHT) - gradient(streamed, HIDDEN - step, WEIGHT)) / 2e-5
        torch.testing.assert_close(product(streamed)[0], slope, rtol=1e-6, atol=1e-8)


def product(function):
    """The product of the second derivatives with ALONG, by hidden states and weight."""
    leaves = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()]
    (first,) = torch.autograd.grad(function(*leaves), leaves[:1], create_graph=True)
    return torch.autograd.grad((first * ALONG).sum(), leaves)


def test_lazy_logits_that_are_made_under_a_transform_are_torchs_own_error():
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        torch.func.grad(lambda h: F.cross_entropy(LazyLogits.of(h, Head(WEIGHT)), LABELS))(HIDDEN)
