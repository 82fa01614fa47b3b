"""F2C: votes, splits and losses worked by hand; a step against a dense one; its data; what it reports."""

import copy
import pickle
import re

import datasets
import numpy as np
import peft
import pytest
import torch
from torch.nn import functional as F

from hf_xent.data import Format, PromptFormats
from hf_xent.metrics.consistency import consistency
from hf_xent.patching import patch_state
from hf_xent.trainers import F2CConfig, F2CTrainer
from hf_xent.trainers import consensus as method
from support.models import assert_same_gradients, tiny, tiny_tokenizer

# the method sheet's worked example: 5 formats, 2 answers of one token, next-token distributions over 3 tokens
SCORES = torch.tensor([[-0.2, -1.9], [-0.3, -1.3], [-0.5, -0.9], [-1.0, -0.6], [-0.4, -1.6]])
P = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.2, 0.5, 0.3], [0.8, 0.1, 0.1]])
LOGP, VALID = P.log()[:, None], torch.ones(5, 1, dtype=torch.bool)


def test_the_worked_example():
    assert method.consensus(SCORES) == 0
    found = method.split(SCORES, 0, threshold=0.4, top_k=3)
    assert found == method.Split(agreeing=(0, 4, 1), teachers=(0, 4, 1), students=(2, 3))
    teachers, students = [0, 4, 1], [2, 3]
    torch.testing.assert_close(method.mixture(LOGP[teachers], VALID[teachers]).exp()[0], P[0])
    agreement = method.agreement(LOGP[teachers], VALID[teachers])
    assert agreement.item() == pytest.approx(0.023105, abs=1e-6)
    assert method.agreement(LOGP, VALID).item() == pytest.approx(0.110249, abs=1e-6)
    total, count = method.alignment((LOGP[teachers], VALID[teachers]), (LOGP[students], VALID[students]))
    aligned = total / count
    assert aligned.item() == pytest.approx(0.383801, abs=1e-6)
    gap = SCORES[teachers, 0].mean() - SCORES[students, 0].mean()
    weight = 0.05 + 0.3 * torch.sigmoid(gap / 2)
    assert (gap.item(), weight.item()) == pytest.approx((0.45, 0.216804), abs=1e-6)
    loss = -SCORES[:, 0].mean() + 0.1 * agreement + weight * aligned
    assert loss.item() == pytest.approx(0.565520, abs=1e-6)


def test_the_vote_is_a_strict_majority():
    ask = lambda *answers: method.consensus(F.one_hot(torch.tensor(answers), 3).float())  # noqa: E731
    assert ask(0, 0, 1, 1) is None and ask(0, 0, 0, 1) == 0 and ask(0, 1, 2) is None and ask(2, 2, 1) == 2
    assert method.consensus(torch.zeros(3, 2)) == 0, "equal scores are the lowest answer"


def test_every_branch_of_the_split():
    strong = torch.tensor([[0.0, -2.0]] * 4)
    assert method.split(strong, 0, 1.5, 3) == method.Split(agreeing=(0, 1, 2, 3))
    weak = method.split(strong, 0, 2.5, 3)
    assert weak.teachers == (0, 1, 2) and weak.students == (3,)
    assert method.split(SCORES, 0, 0.4, 1) == method.Split(agreeing=())  # one teacher is none
    assert method.split(SCORES[[0, 1, 3]], 0, 0.4, 3) == method.Split(agreeing=())  # of two that agree, too
    even = torch.tensor([[0.0, -1.0], [0.0, -3.0]])
    assert method.split(even, 0, 2.0, 3).agreeing == (0, 1), "the median of 1 and 3 is 2"


def test_gradients_reach_the_mixture_of_j_and_not_of_a():
    logits = P.log().clone().requires_grad_()
    logp = logits.log_softmax(-1)[:, None]
    total, _ = method.alignment((logp[[0, 1, 4]], VALID[[0, 1, 4]]), (logp[[2, 3]], VALID[[2, 3]]))
    [grad] = torch.autograd.grad(total, logits)
    assert grad[[0, 1, 4]].abs().max() == 0
    teacher = P[[0, 1, 4]].mean(0)
    torch.testing.assert_close(grad[[2, 3]], P[[2, 3]] - teacher)  # one token each, summed
    torch.autograd.gradcheck(
        lambda z: method.agreement(z.log_softmax(-1)[:, None], VALID), (P.log().double().requires_grad_(),)
    )
    same = LOGP[[0, 0, 0]]
    assert method.agreement(same, VALID[:3]).abs() < 1e-7


def test_answers_of_different_lengths_meet_where_both_have_tokens():
    logp = torch.randn(3, 2, 7).log_softmax(-1)
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    mean = method.mixture(logp, valid)
    torch.testing.assert_close(mean.exp()[0], logp.exp()[:, 0].mean(0))
    torch.testing.assert_close(mean.exp()[1], logp.exp()[[0, 2], 1].mean(0))
    _, count = method.alignment((logp[1:2], valid[1:2]), (logp[[0, 2]], valid[[0, 2]]))
    assert count == 2, "the teacher has no second token"
    logp.requires_grad_()
    lone = torch.tensor([[True, False], [True, False]])
    [grad] = torch.autograd.grad(method.agreement(logp[:2], lone), logp)
    assert grad.isfinite().all(), "tokens nobody has are no NaN"


FORMATS = PromptFormats(
    Format("the {animal} is quick or not", ("quick", "not")),
    Format("is the {animal} quick", ("the fox", "lazy")),
    Format("{animal} jumps over", ("the dog", "the lazy dog")),
    Format("the {animal}", ("jumps", "over the dog")),
    Format("the lazy {animal} jumps", ("over", "the lazy")),
)
ANIMALS = ["fox", "dog", "brown fox", "lazy dog", "quick dog", "lazy fox"]


@pytest.fixture(scope="module")
def rows():
    items = datasets.Dataset.from_dict({"animal": ANIMALS, "label": [0, 1, 0, 1, 0, 1]})
    return FORMATS.build(items, tiny_tokenizer())


def test_rows_of_all_formats(rows):
    tokenizer = tiny_tokenizer()
    assert set(rows.column_names) == {"prompts", "answers", "gold"}
    assert tokenizer.decode(rows[0]["prompts"][1]).strip() == "is the fox quick"
    assert (
        tokenizer.decode(rows[0]["answers"][0][1]) == " not" and tokenizer.decode(rows[0]["answers"][1][1]) == " lazy"
    )
    batch = FORMATS.collate([rows[0], rows[2]], pad=0)
    assert batch["input_ids"].shape == batch["answers"].shape and batch["input_ids"].shape[:3] == (2, 5, 2)
    whole = batch["input_ids"][1, 2, 1][batch["attention_mask"][1, 2, 1].bool()]
    assert tokenizer.decode(whole).strip() == "brown fox jumps over the lazy dog"
    kept = batch["answers"][1, 2, 1]
    assert tokenizer.decode(kept[kept != -100]) == " the lazy dog"
    assert batch["gold"].tolist() == [0, 0]


def test_chat_templates_and_refusals():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    items = datasets.Dataset.from_dict({"animal": ["fox"]})
    row = FORMATS.build(items, tokenizer)[0]
    expected = tokenizer("<s>the fox is quick or not</s><s>", add_special_tokens=False)["input_ids"]
    assert row["prompts"][0] == expected and "gold" not in row
    plain = FORMATS.build(items, tokenizer, chat=False)[0]
    assert plain["prompts"][0] == tokenizer("the fox is quick or not")["input_ids"]
    with pytest.raises(ValueError, match=r"has the field 'bird', but items have animal"):
        PromptFormats(Format("{bird}", ("a", "b")), Format("{animal}", ("a", "b"))).build(items, tokenizer)
    with pytest.raises(ValueError, match="at least two formats, all with the same number"):
        PromptFormats(Format("{animal}", ("a", "b")), Format("{animal}", ("a", "b", "c")))

    class Letters:
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    row = PromptFormats(Format("x ", ("a", "b")), Format("y", ("a", "b"))).build(items, Letters())[0]
    assert row["answers"] == [[[97], [98]], [[32, 97], [32, 98]]], "a space goes before an answer, but one"

    class Merging:  # a tokenizer that merges across the boundary
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": [len(text)]}

    with pytest.raises(ValueError, match=r"not a prefix of those with its answer 'a'"):
        PromptFormats(Format("x", ("a", "b")), Format("y", ("a", "b"))).build(items, Merging())


def trainer_of(folder, rows, model=None, **options):
    common = {
        "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "report_to": [],
        "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = F2CConfig(output_dir=str(folder), **{**common, **options})
    return F2CTrainer(tiny(std=0.2) if model is None else model, config, train_dataset=rows, eval_dataset=rows)


def dense_loss(model, row, args):
    """One item's loss from full logits, by the formulas, nothing shared with the trainer."""
    scores, logits = [], {}
    for k, (prompt, answers) in enumerate(zip(row["prompts"], row["answers"], strict=True)):
        scores.append([])
        for c, answer in enumerate(answers):
            z = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logits[k, c] = z
            scores[k].append(z.gather(-1, torch.tensor(answer)[:, None]).mean())
    table = torch.tensor([[float(s.detach()) for s in line] for line in scores])
    votes = table.argmax(-1).tolist()
    label = max(set(votes), key=votes.count)
    if 2 * votes.count(label) <= len(votes):
        return 0 * scores[0][0]
    loss = -args.cce_weight * sum(line[label] for line in scores) / len(scores)
    margins = {
        k: float(table[k, label] - max(table[k, c] for c in range(table.shape[1]) if c != label))
        for k in range(len(votes))
        if votes[k] == label
    }
    median = float(np.median(list(margins.values())))
    best = sorted(margins, key=margins.get, reverse=True)[: min(args.top_k, len(margins) - 1)]
    strong = len(margins) == len(votes) and median >= args.threshold
    together = list(range(len(votes))) if strong else (best if len(best) >= 2 else [])

    def mixed(members, t):
        return torch.stack([logits[k, label][t].exp() for k in members if len(logits[k, label]) > t]).mean(0)

    terms = [
        ((mixed(together, t) - z.exp()) * (mixed(together, t).log() - z)).sum() / 2
        for k in together
        for t, z in enumerate(logits[k, label])
    ]
    if terms:
        loss = loss + args.agreement_weight * sum(terms) / len(terms)
    if len(best) >= 2 and not strong:
        students = [k for k in range(len(votes)) if k not in best]
        pulls = []
        for s in students:
            for t in range(len(logits[s, label])):
                if any(len(logits[k, label]) > t for k in best):
                    pulls.append(F.kl_div(logits[s, label][t], mixed(best, t).detach(), reduction="sum"))
        gap = table[best, label].mean() - table[students, label].mean()
        weight = args.alignment_min + (args.alignment_max - args.alignment_min) * torch.sigmoid(
            gap / args.weight_temperature
        )
        loss = loss + float(weight) * sum(pulls) / len(pulls)
    return loss / table.shape[1]


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.0}, {"method": "cce"}, {"threshold": 9.0, "top_k": 2, "agreement_weight": 0.9}]
)
def test_three_steps_equal_a_dense_reference(tmp_path, rows, options):
    trainer, dense = trainer_of(tmp_path, rows, **options), tiny(std=0.2)
    reference = copy.copy(trainer.args)
    if options.get("method") == "cce":
        reference.agreement_weight = reference.alignment_min = reference.alignment_max = 0.0
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (trainer.model, dense))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    for step in range(3):
        items = [rows[2 * step], rows[2 * step + 1]]
        expected = sum(dense_loss(dense, item, reference) for item in items) / 2
        expected.backward()
        loss = trainer.training_step(trainer.model, FORMATS.collate(items), None)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
        found, stock = (
            {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (trainer.model, dense)
        )
        assert_same_gradients(found, stock, rtol=1e-4)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert patch_state(trainer.model).materialized == 0
    if not options:  # teachers and students were among them
        found = trainer._means(True)
        assert all(found[f"loss_{name}"] > 0 for name in ("cce", "agreement", "alignment"))


def test_swarm_aligns_every_answer_to_the_mixture_of_all(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, method="swarm")
    batch, model = FORMATS.collate([rows[1]]), trainer.model
    found = trainer.compute_loss(model, batch)
    expected = []
    for label in range(2):
        logits = [
            model(torch.tensor([p + a[label]])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for p, a in zip(rows[1]["prompts"], rows[1]["answers"], strict=True)
        ]
        terms = []
        for t in range(max(map(len, logits))):
            there = [z[t] for z in logits if len(z) > t]
            mean = torch.stack(there).exp().mean(0)
            terms += [F.kl_div(z, mean, reduction="sum") for z in there]
        expected.append(sum(terms) / len(terms))
    torch.testing.assert_close(found, sum(expected) / 2, rtol=1e-4, atol=1e-6)


def test_accumulation_does_not_change_gradients(tmp_path, rows):
    """Also where an item has no consensus: it counts in the mean."""
    found = []
    for size, accumulation in ((6, 1), (3, 2), (1, 6)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = trainer_of(tmp_path, rows, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        trainer.train()
        entry = next(e for e in trainer.state.log_history if "loss" in e)
        found.append((entry["loss"], entry["grad_norm"], entry["consensus"]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_without_consensus_nothing_moves(tmp_path, rows):
    two = rows.map(lambda row: {"prompts": row["prompts"][:2], "answers": row["answers"][:2]})
    trainer = trainer_of(tmp_path, two)
    split = torch.tensor([[[0.0, -1.0], [-1.0, 0.0]]] * 2)
    trainer.scores = lambda model, inputs: split
    loss = trainer.compute_loss(trainer.model, FORMATS.collate([two[0], two[1]]))
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.abs().max() == 0 for p in trainer.model.parameters())


def test_scores_do_not_depend_on_padding(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows)
    together = trainer.scores(trainer.model, FORMATS.collate([rows[0], rows[4]]))
    alone = [trainer.scores(trainer.model, FORMATS.collate([rows[i]]))[0] for i in (0, 4)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_only_formats_with_the_same_words_are_compared_if_asked(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, group_answers=True)
    targets = torch.tensor([[5, 6], [5, 6], [7, -100], [5, 6]])
    assert trainer._groups(targets) == [[0, 1, 3], [2]]
    trainer.args.group_answers = False
    assert trainer._groups(targets) == [[0, 1, 2, 3]]


def test_resume_adapters_and_bfloat16(tmp_path, rows):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight, resumed = trainer_of(tmp_path, rows, **options), trainer_of(tmp_path, rows, **options)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (straight, resumed)]
    assert losses[0] == losses[1]
    adapted = peft.get_peft_model(tiny(std=0.2), peft.LoraConfig(target_modules=["q_proj"], r=4))
    for model in (adapted, tiny(std=0.2, dtype=torch.bfloat16)):
        trainer = trainer_of(tmp_path / "other", rows, model=model)
        trainer.train()
        assert all(0 <= e["loss"] < 10 for e in trainer.state.log_history if "loss" in e)
        assert patch_state(trainer.model).materialized == 0


def test_evaluation_reports_consistency_beside_the_constant_predictor(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows)
    found = trainer.evaluate()
    scores = torch.cat([trainer.scores(trainer.model, FORMATS.collate([row])) for row in rows])
    expected = consistency(scores.argmax(-1).numpy(), np.array(rows["gold"]), 2).as_dict()
    assert {
        k.removeprefix("eval_"): v for k, v in found.items() if k.removeprefix("eval_") in expected
    } == pytest.approx(expected)
    assert {
        "eval_loss",
        "eval_consensus",
        "eval_loss_agreement",
        "eval_f1_spread",
        "eval_constant_accuracy",
    } <= found.keys()
    again = trainer.evaluate()
    assert again["eval_loss"] == found["eval_loss"]
    silent = trainer.evaluate(rows.remove_columns("gold"))
    assert silent["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5) and "eval_f1" not in silent


def test_consistency_by_hand():
    """Counts [4, 1], [5, 0], [3, 2] of five formats: agreement 2/3."""
    predictions = np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    found = consistency(predictions, np.array([0, 0, 1]), 2)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.marginals == pytest.approx((12 / 15, 3 / 15))
    assert found.f1 == pytest.approx(np.mean([0, 0, 0, 1, 2 / 3])) and found.f1_spread == pytest.approx(
        np.std([0, 0, 0, 1, 2 / 3])
    )
    assert (found.constant_accuracy, found.constant_f1) == pytest.approx(
        (2 / 3, 0)
    ) and found.vote_accuracy == pytest.approx(2 / 3)
    assert consistency(np.zeros((4, 3), int), np.array([0, 1, 2, 0]), 3).agreement == 1.0
    assert consistency(np.array([[0, 1]]), np.array([0]), 2).agreement == 0.0
    with pytest.raises(ValueError, match="at least two"):
        consistency(np.zeros((4, 1), int), np.zeros(4, int), 2)


def test_refusals():
    with pytest.raises(ValueError, match="method is 'vote'"):
        F2CConfig(output_dir="x", use_cpu=True, method="vote")
    with pytest.raises(ValueError, match="alignment_min is 2"):
        F2CConfig(output_dir="x", use_cpu=True, alignment_min=2.0)


def test_the_collator_pickles(tmp_path, rows):
    """For workers that are spawned."""
    collator = pickle.loads(pickle.dumps(trainer_of(tmp_path, rows).data_collator))
    expected = FORMATS.collate([rows[0], rows[1]])
    found = collator([rows[0], rows[1]])
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def labeled(rows, gold):
    return rows.remove_columns("gold").add_column("gold", gold)


@pytest.mark.parametrize("gold", [["yes", "no"] * 3, [None, 1] * 3, [-1] * 6, [7] * 6])
def test_gold_is_not_read_in_training(tmp_path, rows, gold):
    trainer = trainer_of(tmp_path, labeled(rows, gold), max_steps=1)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    plain = trainer_of(tmp_path, rows.remove_columns("gold"), max_steps=1)
    plain.train()
    assert found == [entry["loss"] for entry in plain.state.log_history if "loss" in entry]


def test_gold_that_is_not_known_is_left_out_of_the_report(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows)
    unknown = trainer.predict(labeled(rows, [-1] * 6))
    assert unknown.predictions.shape == (6, 5) and "test_f1" not in unknown.metrics
    known = np.array([0, -1, 1, -1, 1, 0])
    some = trainer.predict(labeled(rows, known.tolist()))
    expected = consistency(some.predictions[known >= 0], known[known >= 0], 2).as_dict()
    assert {name: some.metrics[f"test_{name}"] for name in expected} == expected
    missing = trainer.predict(labeled(rows, [None if y < 0 else int(y) for y in known]))
    assert missing.metrics["test_f1"] == some.metrics["test_f1"]


@pytest.mark.parametrize(("gold", "shown"), [(["yes", "no"] * 3, "'yes'"), ([0, 2] * 3, "2"), ([0.5] * 6, "0.5")])
def test_gold_that_is_no_answer_is_refused_in_evaluation(tmp_path, rows, gold, shown):
    with pytest.raises(ValueError, match=f"gold has {re.escape(shown)}: .* the right answer, 0 to 1"):
        trainer_of(tmp_path, rows).evaluate(labeled(rows, gold))


def test_every_evaluation_has_its_own_names(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, eval_do_concat_batches=False, remove_unused_columns=True)
    sets = {"a": rows.select(range(2)), "b": rows.select(range(2, 6)).add_column("note", ["x"] * 4)}
    trainer.predict(sets["b"])
    found = trainer.evaluate(sets)
    alone = {name: trainer_of(tmp_path, rows).evaluate(part) for name, part in sets.items()}
    for name in ("consensus", "loss_cce", "agreement", "f1"):
        assert f"eval_{name}" not in found
        for part in sets:
            key = f"eval_{name}"
            assert (f"eval_{part}_{name}" in found) == (key in alone[part])
            if key in alone[part]:
                assert found[f"eval_{part}_{name}"] == pytest.approx(alone[part][key])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracer reads it
def test_a_compiled_model_trains_as_it_does_without(tmp_path, rows):
    losses = []
    for options in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        trainer = trainer_of(tmp_path, rows, max_steps=2, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert patch_state(trainer.model).materialized == 0
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_eval_metrics": True}, "batch_eval_metrics is True, but consistency is computed over all"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True"),
        ({"method": "cce", "agreement_weight": 0.9}, "agreement_weight is 0.9, but method is 'cce'"),
        ({"method": "swarm", "cce_weight": 0.9}, "cce_weight is 0.9, but method is 'swarm'"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(tmp_path, rows, **options)


def test_rows_that_are_no_items_are_refused(tmp_path, rows):
    collate = trainer_of(tmp_path, rows).data_collator
    with pytest.raises(ValueError, match="a row has text: F2C needs prompts and answers"):
        collate([{"text": "fox"}])
    with pytest.raises(ValueError, match="every answer needs a token"):
        collate([{"prompts": [[5], [6]], "answers": [[[7], []], [[7], [8]]]}])


def test_sequences_with_the_same_input_share_a_forward(tmp_path):
    model = tiny("llama")
    rows = [{"prompts": [[5, 6, 7], [8, 9]], "answers": [[[11], [12], [13]], [[21, 22], [21, 23], [24, 25, 26]]]}]
    batch = PromptFormats.collate(rows)
    trainer = F2CTrainer(model, F2CConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scores = trainer.scores(model, batch)
    hook.remove()
    assert [shape[0] for shape in seen] == [3], "5 6 7 | 8 9 21 | 8 9 24 25, each once"
    for k, prompt in enumerate(rows[0]["prompts"]):
        for c, answer in enumerate(rows[0]["answers"][k]):
            logp = model(torch.tensor([prompt + answer])).logits.float().log_softmax(-1)[0]
            dense = torch.stack([logp[len(prompt) + t - 1, token] for t, token in enumerate(answer)]).mean()
            assert scores[0, k, c].item() == pytest.approx(dense.item(), abs=1e-5)
