"""EMOTrainer: its variants and baselines against dense steps, its costs, what it logs."""

import peft
import pytest
import torch
from torch.nn import functional as F

from hf_xent.losses import EMO, MixCE
from hf_xent.patching import patch_state
from hf_xent.trainers import EMOConfig, EMOTrainer, XentTrainer
from support.models import V, assert_same_gradients, tiny, tiny_tokenizer
from test_trainers import arguments, collate, fit, losses_of, rows  # noqa: F401  rows is a fixture


def trainer_of(folder, rows, model=None, loss=None, **options):  # noqa: F811
    config = arguments(folder, EMOConfig, **options)
    model = tiny(std=0.3) if model is None else model
    return EMOTrainer(model, config, loss=loss, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def dense_loss(z, y, cost, kind, clamp=float("inf"), detach=False):
    """The papers' formulas on dense logits and labels, per token."""
    q, nll = z.softmax(-1), F.cross_entropy(z, y, reduction="none")
    p = q.gather(-1, y[:, None]).squeeze(-1)
    if kind == "tailr":  # gamma 0.1, w_min 0.3
        return (p / (0.1 + 0.9 * p)).clamp(0.3, 1).detach() * nll
    if kind == "mixce":  # eta 0.7
        return (0.7 + 0.3 * p.detach()) * nll
    units = F.normalize(cost, dim=-1)
    distance = 1 - (q * (units[y] @ units.T)).sum(-1) + (p.detach() if detach else 0)
    if kind == "emo":
        return distance
    if kind == "emo2":
        return (distance / nll).detach() * nll + distance
    return 0.5 * (nll + (nll / distance).detach().clamp(max=clamp) * distance)


CASES = {
    "emo1": ({}, {}),
    "emo2": ({"variant": "emo2"}, {"kind": "emo2"}),
    "the distance alone": ({"variant": "emo"}, {"kind": "emo"}),
    "clamped": ({"ratio_clamp": 3.0}, {"clamp": 3.0}),
    "gt-detached": ({"gt_detach": True}, {"detach": True}),
    "emo2 gt-detached": ({"variant": "emo2", "gt_detach": True}, {"kind": "emo2", "detach": True}),
    "current head": ({"cost": "current"}, {"current": True}),
    "tailr": ({"loss": "tailr:gamma=0.1, w_min=0.3"}, {"kind": "tailr"}),
    "mixce": ({"loss": "mixce:eta=0.7"}, {"kind": "mixce"}),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_a_dense_reference(tmp_path, rows, case):  # noqa: F811
    options, formula = CASES[case]
    trainer, dense = trainer_of(tmp_path, rows, **options), tiny(std=0.3).train()
    frozen = dense.lm_head.weight.detach().clone()
    formula = {"kind": "emo1", **formula}
    current = formula.pop("current", False)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05)
    ours = torch.optim.SGD(trainer.model.parameters(), lr=0.05)
    trainer.model.train()
    for step in range(3):
        inputs = collate([rows[i] for i in range(4 * step, 4 * step + 4)])
        z, y = dense(inputs["input_ids"]).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        cost = dense.lm_head.weight.detach() if current else frozen
        expected = dense_loss(z[y != -100], y[y != -100], cost, **formula).mean()
        expected.backward()
        loss = trainer.training_step(trainer.model, dict(inputs), (y != -100).sum())
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
        found, stock = ({n: p.grad for n, p in m.named_parameters()} for m in (trainer.model, dense))
        assert_same_gradients(found, stock, rtol=1e-4)
        for each in (optimizer, ours):
            each.step()
            each.zero_grad()
    assert patch_state(trainer.model).materialized == 0


def test_the_logged_loss_of_emo1_is_the_nll(tmp_path, rows):  # noqa: F811
    trainer = trainer_of(tmp_path, rows, max_steps=2, per_device_eval_batch_size=len(rows))
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(torch.tensor(entry["perplexity"]).log().item(), rel=1e-5)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(torch.tensor(found["eval_perplexity"]).log().item(), rel=1e-5)


def test_the_cost_of_another_model(tmp_path, rows):  # noqa: F811
    """Of another hidden size, by path; one of another vocabulary is refused before anything runs."""
    other = tiny("llama", std=0.3, hidden_size=16, head_dim=4)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    trainer = trainer_of(tmp_path, rows, cost=str(tmp_path / "other"))
    torch.testing.assert_close(trainer.objective.cost, F.normalize(other.lm_head.weight.detach(), dim=-1))
    assert trainer.objective.cost.shape == (V, 16)
    trainer.train()
    assert all(0 < loss < 20 for loss in losses_of(trainer))
    tiny(vocab_size=V + 3).save_pretrained(tmp_path / "wider")
    tiny_tokenizer().save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=rf"cost has {V + 3} rows but the head {V} tokens"):
        trainer_of(tmp_path, rows, cost=str(tmp_path / "wider"))


def test_a_frozen_cost_stays_with_tied_embeddings(tmp_path, rows):  # noqa: F811
    trainer = trainer_of(tmp_path, rows, model=tiny("llama tied", std=0.3), max_steps=2)
    before = trainer.model.lm_head.weight.detach().clone()
    objective = trainer.model.loss_function.loss
    trainer.train()
    assert torch.equal(objective.cost, F.normalize(before, dim=-1))
    assert not torch.equal(trainer.model.lm_head.weight.detach(), before)


def test_options_and_baselines(tmp_path, rows):  # noqa: F811
    config = EMOConfig(output_dir=str(tmp_path), use_cpu=True, variant="emo2", gt_detach=True)
    assert EMOTrainer._objective(config, None).describe() == {
        "loss": "emo", "variant": "emo2", "cost": "frozen", "gt_detach": True, "ratio_clamp": None,
    }  # fmt: skip
    assert trainer_of(tmp_path, rows, loss=MixCE(eta=0.3)).objective == MixCE(eta=0.3)
    assert isinstance(EMOTrainer(tiny(), train_dataset=rows).args, EMOConfig)
    with pytest.raises(ValueError, match="variant is 'emo3'"):
        trainer_of(tmp_path, rows, variant="emo3")
    with pytest.raises(ValueError, match=r"ratio_clamp is 3.0 in emo2"):
        trainer_of(tmp_path, rows, variant="emo2", ratio_clamp=3.0)


def test_equals_the_same_loss_by_name(tmp_path, rows):  # noqa: F811
    named = fit(tmp_path / "named", rows, kind=XentTrainer, loss=EMO())
    trainer = trainer_of(tmp_path / "own", rows, model=tiny(std=0.05))
    trainer.train()
    assert losses_of(trainer) == losses_of(named)


def test_accumulation_resume_adapters_and_bfloat16(tmp_path, rows):  # noqa: F811
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, rows, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        trainer.train()
        found.append((losses_of(trainer)[0], trainer.state.log_history[0]["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    saved = {"save_strategy": "steps", "save_steps": 2}
    straight, resumed = trainer_of(tmp_path, rows, **saved), trainer_of(tmp_path, rows, **saved)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(straight)
    adapted = peft.get_peft_model(tiny(std=0.3), peft.LoraConfig(target_modules=["q_proj"], r=4))
    for model in (adapted, tiny(std=0.3, dtype=torch.bfloat16)):
        trainer = trainer_of(tmp_path / "other", rows, model=model, max_steps=2)
        trainer.train()
        assert all(0 < loss < 20 for loss in losses_of(trainer))
        assert patch_state(trainer.model).materialized == 0
