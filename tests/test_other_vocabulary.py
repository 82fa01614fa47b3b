"""Distillation across vocabularies: losses against dense formulas and TRL's code, and the teacher that reads text."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tokenizers import normalizers
from torch.nn import functional as F

from hf_xent import losses
from hf_xent.losses import JSD, ForwardKL, ReverseKL, SkewKL, TotalVariation
from hf_xent.losses.other_vocabulary import OtherVocabulary, Spans
from hf_xent.models.vocabularies import vocabulary_of
from hf_xent.ops import Head
from hf_xent.patching import lazily, patch
from hf_xent.teachers.other_vocabulary import OtherVocabularyTeacher, PaddedTeacher, for_student, sequences
from hf_xent.trainers import DistillationConfig, DistillationTrainer
from support.models import tiny
from support.oracle import Largest, assert_no_worse
from support.vocabularies import byte_level, byte_offsets, sentencepiece, trl_uld

V, V2, D, D2, T = 29, 41, 6, 5, 7
SHARED = ([3, 0, 28, 11, 5, 17], [40, 2, 7, 1, 39, 20])
OBJECTIVES = [
    ForwardKL(), ReverseKL(temperature=2.0), JSD(beta=0.3), SkewKL(reverse=True), TotalVariation(temperature=0.7)
]  # fmt: skip
each = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: type(x).__name__)


def problem(dtype=torch.float64, size=V, size2=V2, shared=SHARED, **options):
    """A student with a bias and a softcap, a teacher of other sizes, labels and positions without an opinion."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    leaves = [x.requires_grad_() for x in (draw(2, T, D), draw(size, D), draw(size))]
    labels = torch.randint(size, (2, T))
    labels[0, :2], labels[1, 5] = -100, -100
    mask = torch.rand(2, T) < 0.7
    shared = {} if shared is None else dict(zip(("student_ids", "teacher_ids"), map(torch.tensor, shared), strict=True))
    target = OtherVocabulary(draw(2, T, D2), Head(draw(size2, D2), softcap=5.0), mask=mask, **shared, **options)
    head = Head(leaves[1], leaves[2], scale=0.9, softcap=6.0)
    return SimpleNamespace(hidden=leaves[0], head=head, labels=labels, leaves=leaves, target=target)


def dense(p, temperature):
    """Probabilities of both models, [N, V] and [N, V2], at the positions that have a label and an opinion."""
    keep = (p.labels != -100) & (True if p.target.mask is None else p.target.mask)
    return [
        (head.logits(hidden[keep]) / temperature).softmax(-1)
        for hidden, head in ((p.hidden, p.head), (p.target.hidden, p.target.head))
    ]


def divergence(objective, p, q):
    """The divergence of a teacher p and a student q, from its definition."""
    if isinstance(objective, TotalVariation):
        return (p - q).abs().sum(-1) / 2
    if isinstance(objective, SkewKL):
        return torch.special.xlogy(q, q / ((1 - objective.alpha) * p + objective.alpha * q)).sum(-1)
    if isinstance(objective, JSD):
        m = objective.beta * p + (1 - objective.beta) * q
        kl_p, kl_q = (torch.special.xlogy(x, x / m).sum(-1) for x in (p, q))
        return objective.beta * kl_p + (1 - objective.beta) * kl_q
    one, two = (p, q) if isinstance(objective, ForwardKL) else (q, p)
    return torch.special.xlogy(one, one / two).sum(-1)


def classes(p, ids, others):
    """The probabilities of S classes and of one of all others, or normalized again without it."""
    picked = p[:, ids]
    if others == "ignore":
        return picked / picked.sum(-1, keepdim=True)
    return torch.cat([picked, 1 - picked.sum(-1, keepdim=True)], 1)


def expected(objective, p):
    """The sum over all positions, by the formula."""
    q, t = dense(p, objective.temperature)
    others = p.target.others
    t, q = classes(t, p.target.teacher_ids, others), classes(q, p.target.student_ids, others)
    return objective.temperature**2 * divergence(objective, t, q).sum()


def assert_equal(found, wanted, leaves):
    """Values and all gradients."""
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (found, wanted)))


# --- losses of shared tokens -----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("others", ["class", "ignore"])
def test_shared_tokens_equal_the_formula(objective, others):
    p = problem(others=others)
    for budget in (None, 1):
        found, stats = objective.compute(
            p.hidden, p.head, p.labels, teacher=p.target, reduction="sum", observe=("entropy",), memory_budget=budget
        )
        assert_equal(found, expected(objective, p), p.leaves)
    silent = (p.labels == -100) | ~p.target.mask
    assert not stats.loss[silent].any() and (stats.loss[~silent] > 0).all()
    logp = p.head.logits(p.hidden).log_softmax(-1)
    torch.testing.assert_close(stats.logp[stats.mask], logp[stats.mask].gather(-1, p.labels[stats.mask, None])[:, 0])
    torch.testing.assert_close(stats.entropy[stats.mask], -(logp.exp() * logp).sum(-1)[stats.mask])
    mean = objective(p.hidden, p.head, p.labels, teacher=p.target, num_items=11)
    torch.testing.assert_close(mean, found / 11)  # positions without an opinion count, with 0


def test_cross_entropy_is_mixed_in_where_the_teacher_is_silent_too():
    p = problem()
    found, stats = ForwardKL(ce_weight=0.25).compute(
        p.hidden, p.head, p.labels, teacher=p.target, reduction="sum", observe=("top",)
    )
    logits = p.head.logits(p.hidden)
    wanted = 0.75 * expected(ForwardKL(), p) + 0.25 * F.cross_entropy(
        logits.flatten(0, 1), p.labels.flatten(), reduction="sum"
    )
    assert_equal(found, wanted, p.leaves)
    assert (stats.loss[p.labels != -100] > 0).all() and not stats.loss[p.labels == -100].any()


@each
def test_equal_vocabularies_are_the_plain_divergence(objective):
    order = torch.randperm(V)
    p = problem(size2=V, shared=(order.tolist(), order.tolist()))
    plain = (p.target.hidden, p.target.head)
    labels = torch.where(p.target.mask, p.labels, -100)
    for target in (p.target, replace(p.target, student_ids=None, teacher_ids=None)):
        wanted = objective(p.hidden, p.head, labels, teacher=plain, reduction="sum")
        assert_equal(objective(p.hidden, p.head, p.labels, teacher=target, reduction="sum"), wanted, p.leaves)


@each
def test_classes_are_a_lower_bound_and_more_of_them_a_closer_one(objective):
    p = problem(size2=V, shared=None)
    labels = torch.where(p.target.mask, p.labels, -100)
    plain = objective(p.hidden, p.head, labels, teacher=(p.target.hidden, p.target.head), reduction="none").detach()
    order, bounds = torch.randperm(V), []
    for count in (1, 9, 20, V):
        target = replace(p.target, student_ids=order[:count], teacher_ids=order[:count])
        bounds.append(objective(p.hidden, p.head, p.labels, teacher=target, reduction="none").detach())
    for lower, higher in zip(bounds, [*bounds[1:], plain], strict=True):
        assert (lower <= higher + 1e-12).all()
    torch.testing.assert_close(bounds[-1], plain)


@each
def test_certain_models_have_finite_losses_and_gradients(objective):
    """Logits of +-50 in float32, so that the others have no mass that float32 could hold, or all of it."""
    z = torch.full((3, 8), -50.0)
    z[0, 1], z[1, 7], z[2, 2] = 50, 50, 50
    hidden, weight = z.requires_grad_(), torch.eye(8, requires_grad=True)
    target = OtherVocabulary(z.detach().flip(0), Head(torch.eye(8)), torch.arange(4), torch.arange(4))
    found = objective(hidden, Head(weight), torch.zeros(3, dtype=torch.long), teacher=target)
    assert found > 0 and found.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, (hidden, weight)))


def test_bfloat16_is_no_worse_than_torch():
    low, high = problem(torch.bfloat16), problem()
    with torch.no_grad():
        for one, two in zip(low.leaves, high.leaves, strict=True):
            two.copy_(one)
    high.target = replace(
        high.target, hidden=low.target.hidden.double(), head=Head(low.target.head.weight.double(), softcap=5.0)
    )
    for objective in OBJECTIVES:
        found = objective(low.hidden, low.head, low.labels, teacher=low.target, reduction="sum")
        plain, truth = expected(objective, low), expected(objective, high)
        assert_no_worse(found.detach(), plain.detach(), truth.detach())
        grads = (torch.autograd.grad(x, y.leaves) for x, y in ((found, low), (plain, low), (truth, high)))
        for ours, theirs, wanted in zip(*grads, strict=True):
            assert_no_worse(ours, theirs, wanted, atol=2e-3)


@each
@pytest.mark.parametrize(("size", "size2"), [(V, V + 3), (V + 3, V)])
def test_padded_heads_are_compared_over_common_tokens(objective, size, size2):
    p = problem(size=size, size2=size2, shared=None)
    p.target = replace(p.target, others="ignore")
    q, t = ((x[:, :V] / x[:, :V].sum(-1, keepdim=True)) for x in dense(p, objective.temperature))
    wanted = objective.temperature**2 * divergence(objective, t, q).sum()
    assert_equal(objective(p.hidden, p.head, p.labels, teacher=p.target, reduction="sum"), wanted, p.leaves)


def test_what_does_not_fit_is_refused():
    p = problem()

    def refused(match, objective=OBJECTIVES[0], **changes):
        with pytest.raises(ValueError, match=match):
            objective(p.hidden, p.head, p.labels, teacher=replace(p.target, **changes))

    ids = torch.tensor
    refused("choose 'class' or 'ignore'", others="all")
    refused(r"student_ids has shape \(6,\) but teacher_ids \(1,\)", teacher_ids=ids([1]))
    refused(r"student_ids is None, but the teacher's head has 41 tokens", student_ids=None, teacher_ids=None)
    refused(r"student_ids range over \[3, 29\]", student_ids=ids([3, 29]), teacher_ids=ids([3, 4]))
    refused("teacher_ids has a token twice", student_ids=ids([3, 2]), teacher_ids=ids([4, 4]))
    every = torch.arange(V)
    refused("the student's head has shared tokens only, so ForwardKL", student_ids=every, teacher_ids=every)
    for objective in (ReverseKL(), JSD(), TotalVariation()):  # which are finite
        target = replace(p.target, student_ids=every, teacher_ids=every)
        assert objective(p.hidden, p.head, p.labels, teacher=target).isfinite()
    none = torch.empty(0, dtype=torch.long)
    refused("spans is set, but JSD", JSD(), spans=Spans(none, none, none, p.target.hidden[0, :0], none, none))


def test_no_tensor_is_larger_than_the_budget():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(600, 8, requires_grad=True)
    ids = torch.randperm(600)[:500]
    target = OtherVocabulary(torch.randn(64, 4), Head(torch.randn(700, 4)), ids, ids)
    for name in ("forward_kl", "gold"):
        with Largest() as largest:
            loss = losses.get(name)(hidden, Head(weight), torch.zeros(64).long(), teacher=target, memory_budget=100_000)
            loss.backward()
        assert largest.numel <= 100_000 / 4 < 64 * 600


# --- losses of sorted probabilities ----------------------------------------------------------------------------------


def test_universal_logit_equals_the_formula_for_any_two_heads():
    for size2 in (V2, V, 11):
        p = problem(size2=size2, shared=None)
        objective = losses.get("universal_logit", temperature=2.0)
        q, t = (x.sort(-1, descending=True).values for x in dense(p, 2.0))
        size = max(V, size2)
        wanted = 4 * (F.pad(q, (0, size - V)) - F.pad(t, (0, size - size2))).abs().sum()
        assert_equal(objective(p.hidden, p.head, p.labels, teacher=p.target, reduction="sum"), wanted, p.leaves)
    p.target = replace(p.target, mask=None)
    plain = objective(p.hidden, p.head, p.labels, teacher=(p.target.hidden, p.target.head))
    torch.testing.assert_close(plain, objective(p.hidden, p.head, p.labels, teacher=p.target))
    with pytest.raises(ValueError, match="UniversalLogit sorts all probabilities: pass hidden states and head"):
        objective(p.hidden, p.head, p.labels, teacher=losses.targets.TopK(*[p.labels] * 3))


def test_gold_is_matched_and_unmatched_parts():
    p = problem()
    ours, theirs = SHARED
    q, t = dense(p, 1.0)
    m = 0.2 * t[:, theirs] + 0.8 * q[:, ours]
    matched = sum(share * (x * (x / m).log()).sum() for share, x in ((0.2, t[:, theirs]), (0.8, q[:, ours])))
    rest = [x[:, [i for i in range(x.shape[1]) if i not in ids]] for x, ids in ((q, ours), (t, theirs))]
    one, two = (x.sort(-1, descending=True).values for x in rest)
    unmatched = (F.pad(one, (0, V2 - V)) - two).abs().sum()
    for options, w, u in (
        ({}, 6 / V2, 1 - 6 / V2),
        ({"matched_weight": 0.3}, 0.3, 0.7),
        ({"matched_weight": 2.0}, 2.0, 0.0),
        ({"matched_weight": 0.0, "unmatched_weight": 1.5}, 0.0, 1.5),
    ):
        found = losses.get("gold", beta=0.2, **options)(p.hidden, p.head, p.labels, teacher=p.target, reduction="sum")
        torch.testing.assert_close(found, w * matched + u * unmatched)
        grads = (torch.autograd.grad(x, p.leaves, retain_graph=True) for x in (found, w * matched + u * unmatched))
        torch.testing.assert_close(*grads)


# --- the teacher -----------------------------------------------------------------------------------------------------


class Lookup:
    """A teacher whose state after a token depends on the token alone, and which remembers what it was asked."""

    name = "lookup"

    def __init__(self, size, dtype=torch.float64):
        torch.manual_seed(1)
        self.table, self.head = torch.randn(size, D2, dtype=dtype), Head(torch.randn(size, D2, dtype=dtype))

    def targets(self, batch):
        self.asked = batch
        return self.table[batch["input_ids"]], self.head


@pytest.fixture(scope="module")
def pair():
    """The tokenizers of a student and a teacher."""
    return (
        byte_level(300, bos="<s>", eos="</s>", pad="<pad>"),
        byte_level(370, eos="</s>", text="jumping overly unbelievable naïve brown news of the lazy foxes " * 4),
    )


TEXTS = ("the unbelievable fox 🦊 jumps", " naïve news</s>", "over the lazy dog's bed of brown")


def collated(tokenizer, side):
    """The texts as one batch: padded on a side, or packed."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    if side == "packed":
        ids = torch.tensor([[token for row in rows for token in row]])
        batch = {"input_ids": ids, "position_ids": torch.tensor([[k for row in rows for k in range(len(row))]])}
    else:
        tokenizer.padding_side = side
        batch = dict(tokenizer(list(TEXTS), return_tensors="pt", padding=True))
        batch.pop("token_type_ids", None)
    return batch, rows


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_answers_stand_where_both_have_read_the_same(pair, side):
    """By brute force: a position has an answer if some prefix of the teacher's tokens is the same text."""
    student, teacher = pair
    batch, rows = collated(student, side)
    model = Lookup(len(teacher))
    asker = OtherVocabularyTeacher(model, teacher, student)
    target = asker.targets(batch)
    assert target.mask.shape == batch["input_ids"].shape == target.hidden.shape[:-1]
    assert not target.hidden[~target.mask].any()
    covered = total = 0
    flat = zip(sequences(batch), rows, TEXTS, strict=True)
    for positions, ids, text in flat:
        assert batch["input_ids"].flatten()[positions].tolist() == ids
        theirs = teacher(text)["input_ids"]
        read = {student_bytes(teacher, theirs[:k]): theirs[k - 1] for k in range(1, len(theirs) + 1)}
        total += len(ids) - 1
        for k, position in enumerate(positions):
            token = read.get(student_bytes(student, ids[1 : k + 1])) if k + 1 < len(ids) else None
            assert bool(target.mask.flatten()[position]) == (token is not None)
            if token is not None:
                covered += 1
                assert torch.equal(target.hidden.flatten(0, 1)[position], model.table[token])
    assert asker.counts == {"positions": total, "covered": covered, "sequences": 3, "untold": 0}
    assert 0.1 < asker.coverage == covered / total < 0.9
    pairs = zip(target.student_ids.tolist(), target.teacher_ids.tolist(), strict=True)
    assert all(student.decode([i]) == teacher.decode([j]) for i, j in pairs)


def student_bytes(tokenizer, ids):
    """What ids stand for, bytes that are no character included."""
    spelled = vocabulary_of(tokenizer)
    return b"".join(spelled.ordinary.get(token, b"\0") for token in ids)


def test_labels_and_texts_without_translation_are_counted(pair):
    student = pair[0]
    batch, rows = collated(student, "right")
    lower = byte_level(370)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    batch["input_ids"][0, 1] = student.convert_tokens_to_ids("T")
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["labels"][2, :6] = -100
    asker = OtherVocabularyTeacher(Lookup(len(lower)), lower, student)
    target = asker.targets(batch)
    assert not target.mask[0].any() and target.mask[1].any()
    assert (asker.counts["sequences"], asker.counts["untold"]) == (3, 1)
    assert asker.counts["positions"] == sum(map(len, rows)) - 2 - 6
    covered = target.mask[:, :-1] & (batch["labels"][:, 1:] != -100)
    assert asker.counts["covered"] == covered.sum()
    batch["input_ids"][1:] = batch["input_ids"][0]
    batch["attention_mask"][1:] = batch["attention_mask"][0]
    assert not asker.targets(batch).mask.any(), "the teacher is still asked, for its head"


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="its loss of groups was another one")
@pytest.mark.parametrize("name", ["universal_logit", "gold"])
@pytest.mark.parametrize("spans", ["observed", "bayesian"])
def test_spans_equal_trl(pair, spans, name, monkeypatch):
    """TRL's own code on dense logits; for 'observed' it gets them where they predict the token at their index."""
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda x, _: x)  # TRL's floor of probabilities, which is not here
    student, teacher = pair
    prompt, completion = "the quick", " unbelievable naïve fox jumps over 🦊 news of the lazy dog"
    ids, theirs = (torch.tensor(x(prompt + completion)["input_ids"])[None] for x in pair)
    starts = [len(x(prompt)["input_ids"]) for x in pair]
    model, temperature = Lookup(len(teacher)), 1.5
    asker = OtherVocabularyTeacher(model, teacher, student, spans=spans)
    target = asker.targets({"input_ids": ids})
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, ids.shape[1], D), (300, D))
    ]
    hidden, head = leaves[0], Head(leaves[1])
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    labels[:, : starts[0] - 1] = -100
    objective = losses.get(name, temperature=temperature)
    found, stats = objective.compute(hidden, head, labels, teacher=target, reduction="sum")

    def inputs(ids, logits, tokenizer, start):
        if spans == "observed":
            logits = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)
        offsets = torch.zeros(*ids.shape, 2, dtype=torch.long)
        found = byte_offsets(tokenizer, completion)
        offsets[0, start:] = torch.tensor(found)
        return logits, torch.where(torch.arange(ids.shape[1]) < start, -100, ids), ids, offsets

    sides = (
        inputs(ids, head.logits(hidden), student, starts[0]),
        inputs(theirs, model.head.logits(model.table[theirs]), teacher, starts[1]),
    )
    peer = trl_uld(
        uld_token_merge_strategy=spans,
        uld_use_hybrid_loss=name == "gold",
        uld_student_temperature=temperature,
        uld_teacher_temperature=temperature,
        student_tokenizer=student,
        teacher_tokenizer=teacher,
    )
    merged = int((stats.loss != 0).sum())
    assert 3 < merged < len(ids[0]) - starts[0], "there are groups of several tokens"
    per_group = peer(*(x for pair in zip(*sides, strict=True) for x in pair))
    assert_equal(found, temperature**2 * merged * per_group, leaves)


def test_groups_are_tempered_as_the_loss(pair):
    """Without `spans`, positions are those of 'observed' and nothing is multiplied."""
    student, teacher = pair
    batch, _ = collated(student, "right")
    plain, observed = (
        OtherVocabularyTeacher(Lookup(len(teacher)), teacher, student, spans=spans).targets(batch)
        for spans in (None, "observed")
    )
    assert plain.spans is None and torch.equal(plain.mask, observed.mask) and torch.equal(plain.hidden, observed.hidden)
    with pytest.raises(ValueError, match="spans is 'first': choose 'observed' or 'bayesian', or None"):
        OtherVocabularyTeacher(Lookup(len(teacher)), teacher, student, spans="first")
    with pytest.raises(ValueError, match="others is 'none': choose 'class' or 'ignore'"):
        OtherVocabularyTeacher(Lookup(len(teacher)), teacher, student, others="none")


class Local:
    """A patched model as a teacher."""

    def __init__(self, model):
        self.model = patch(model)

    def targets(self, batch):
        with torch.no_grad(), lazily(self.model):
            logits = self.model(**batch).logits
        return logits.hidden, logits.head


def test_a_model_learns_from_one_with_another_tokenizer(pair):
    """Real models: the loss of each position from both models' dense logits, and every gradient of the student."""
    student, theirs = pair[0], sentencepiece(bos="<bos>", eos="</s>")
    batch, rows = collated(student, "left")
    learner = tiny("llama", dtype=torch.float64, vocab_size=300)
    model = tiny("gpt2", dtype=torch.float64, vocab_size=len(theirs), n_embd=16)
    asker = OtherVocabularyTeacher(Local(model), theirs, student)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    logits = learner(**batch).logits
    target = asker.targets(batch)
    (wanted,) = torch.zeros(1, dtype=torch.float64)
    for row, text in enumerate(TEXTS):
        reading = theirs(text, return_tensors="pt")["input_ids"]
        assert reading[0, 0] == theirs.bos_token_id and rows[row][0] == student.bos_token_id
        answers = model(reading).logits[0].detach()
        said = [student_bytes(theirs, reading[0, 1 : k + 1].tolist()).lstrip() for k in range(len(answers))]
        for at in target.mask[row].nonzero()[:, 0].tolist():
            read = student_bytes(student, rows[row][1 : at - logits.shape[1] + len(rows[row]) + 1])
            index = next(k for k in range(len(answers)) if said[k] == read.lstrip())
            p = classes(answers[index].softmax(-1)[None], target.teacher_ids, "class")
            q = classes(logits[row, at].softmax(-1)[None], target.student_ids, "class")
            wanted = wanted + divergence(JSD(beta=0.3), p, q).sum()
    patch(learner)
    with lazily(learner):
        lazy = learner(**batch).logits
    found = lazy.with_head(lambda hidden, head: JSD(beta=0.3)(hidden, head, labels, teacher=target, reduction="sum"))
    assert_equal(found, wanted, list(learner.parameters()))
    assert asker.counts["untold"] == 0 and target.mask.sum() > 8


def test_a_padded_head_needs_no_text(pair):
    student, _ = pair
    batch, _ = collated(student, "right")
    hidden, labels = torch.randn(*batch["input_ids"].shape, D, dtype=torch.float64), batch["input_ids"]
    head, found = Head(torch.randn(300, D, dtype=torch.float64)), {}
    for size in (300, 310):
        teacher = for_student(Lookup(size), student, student)
        assert isinstance(teacher, PaddedTeacher) and teacher.name == "lookup"
        answer, wider = teacher.teacher.targets(batch)
        cut = answer, Head(wider.weight[:300])
        for objective in (JSD(), ForwardKL(ce_weight=0.3)):
            value = objective(hidden, head, labels, teacher=teacher.targets(batch))
            torch.testing.assert_close(value, objective(hidden, head, labels, teacher=cut))
        found[size] = losses.get("universal_logit")(hidden, head, labels, teacher=teacher.targets(batch))
    assert len(found) == 2 and all(x > 0 for x in found.values())
    assert isinstance(for_student(Lookup(370), pair[1], student, others="ignore"), OtherVocabularyTeacher)
    with pytest.raises(ValueError, match="spans is 'observed', but lookup has the student's vocabulary: leave it out"):
        for_student(Lookup(310), student, student, spans="observed")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 2, 2\)"):
        sequences({"input_ids": torch.zeros(1, 2), "attention_mask": torch.ones(1, 1, 2, 2)})


@pytest.mark.filterwarnings("ignore")  # transformers and TRL, of each other's deprecated options
def test_the_trainer_asks_a_model_in_its_own_tokens(pair, tmp_path):
    """By its folder alone; the first loss is that of the untrained models, and the share of covered labels is known."""
    student, theirs = pair
    model = tiny("gpt2", vocab_size=370, n_embd=16)
    model.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    data = Dataset.from_dict({"text": [text.removesuffix("</s>") for text in TEXTS]})
    options = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 0.01}
    options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False, "disable_tqdm": True}
    args = DistillationConfig(str(tmp_path / "out"), objective="jsd", **options)
    given = {"train_dataset": data, "processing_class": student}
    trainer = DistillationTrainer(tiny("llama", vocab_size=300), str(tmp_path / "teacher"), args, **given)
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(3)])
    asker = OtherVocabularyTeacher(Local(model), theirs, student)
    with torch.no_grad(), lazily(trainer.model):
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    wanted = JSD()(logits.hidden, logits.head, labels, teacher=asker.targets(batch))
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert first["loss"] == pytest.approx(float(wanted), rel=1e-4) and second["loss"] < first["loss"]
    assert first["teacher_coverage"] == pytest.approx(asker.coverage) and 0.1 < asker.coverage < 0.9
