"""SPCE: DPO at p = 1, cDPO at constant p, the formula at any p; columns, adapters, resume, and no logits anywhere."""

import copy

import datasets
import peft
import pytest
import torch
import trl
from packaging.version import Version
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_xent.patching import patch, patch_state
from hf_xent.trainers import SPCEConfig, SPCETrainer
from hf_xent.trainers.spce import COLUMNS, REFERENCE, scores_of
from support.models import V, assert_same_gradients, gradients, tiny, tiny_tokenizer
from support.oracle import Largest
from support.preferences import CHOSEN, LORA, PROMPTS, REJECTED, fit, logged, table, trainer_of

if Version(trl.__version__) < Version("1.16"):
    pytest.skip("log-probabilities without logits need TRL's fused head, on CPUs from 1.16 on", allow_module_level=True)

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
P = [0.8, 1.0, 0.5, 0.3, 0.9, 0.65, 0.0, 0.75]
WEIGHT = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0, 0.25]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """TRL loads reference models from where the policy came from."""
    folder = tmp_path_factory.mktemp("model")
    tiny(std=0.05).save_pretrained(folder)
    return folder


SPCE, DPO = (SPCETrainer, SPCEConfig), (trl.DPOTrainer, trl.DPOConfig)
SETTINGS = {
    "plain": {},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "adapter": {"peft_config": peft.LoraConfig(**LORA)},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "forward KL, per token": {"f_divergence_type": "forward_kl", "loss_type": "sigmoid_norm"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
    "length desensitized": {"ld_alpha": 0.3},
    "mixture with sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
}


QUICK = ("plain", "precomputed reference", "adapter", "accumulation")


@pytest.mark.parametrize("setting", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS])
def test_p_of_one_is_dpo_step_for_step(setting, saved, tmp_path):
    options = SETTINGS[setting]
    stock = fit(*DPO, tmp_path / "dpo", saved, **options)
    names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy", "mean_token_accuracy")
    for rows in (table(), table(preference_prob=[1.0] * 8, weight=[1.0] * 8)):
        ours = fit(*SPCE, tmp_path / "spce", saved, rows, **options)
        for mine, theirs in zip(logged(ours, *names), logged(stock, *names), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert patch_state(ours.model).materialized == 0 < patch_state(ours.model).streamed
    assert logged(stock)[-1][0] != pytest.approx(logged(stock)[0][0], rel=2e-3), "nothing learned, nothing compared"


def test_constant_p_is_cdpo(saved, tmp_path):
    """TRL's `aot` sorts pairs before it smooths their labels; with one pair a batch that is cDPO."""
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    peer = fit(*DPO, tmp_path, saved, loss_type="aot", label_smoothing=0.2, **single)
    smoothed = fit(*SPCE, tmp_path, saved, label_smoothing=0.2)
    stated = fit(*SPCE, tmp_path, saved, table(preference_prob=[0.8] * 8))
    ignored = fit(*DPO, tmp_path, saved, label_smoothing=0.2)
    for found in (smoothed, stated):
        assert [x for x, _ in logged(found)] == pytest.approx([x for x, _ in logged(peer)], rel=1e-5)
    assert logged(ignored)[2][0] != pytest.approx(logged(peer)[2][0], rel=1e-3), "if equal, TRL smooths sigmoid now"


def dense_logps(model, inputs):
    """Log-probabilities of whole answers by the full logits of an unpatched model."""
    logp = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
    tokens = logp.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)


def pair_losses(method, z, p, w):
    """The two losses as the docstring has them."""
    if method == "spce":
        return -w * (p * z.sigmoid().log() + (1 - p) * (-z).sigmoid().log())
    return -w * (2 * p - 1).abs() * torch.where(p < 0.5, (-z).sigmoid(), z.sigmoid()).log()


@pytest.mark.parametrize("method", ["spce", "pso"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_values_and_gradients_are_those_of_the_formula(method, divergence, saved, tmp_path):
    rows = table(preference_prob=P, weight=WEIGHT)
    trainer = trainer_of(*SPCE, tmp_path, saved, rows, method=method, f_divergence_type=divergence, label_smoothing=0.1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # as if it had trained for a while
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy, reference = (AutoModelForCausalLM.from_pretrained(saved) for _ in range(2))
    policy.load_state_dict(trainer.model.state_dict())
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    loss.backward()

    with torch.no_grad():
        base = dense_logps(reference, inputs)
    ratios = [logp - ref for logp, ref in zip(dense_logps(policy, inputs), base, strict=True)]
    f = {
        "reverse_kl": lambda r: r,
        "forward_kl": lambda r: -1 / r.exp(),
        "js_divergence": lambda r: (2 * r.exp() / (1 + r.exp())).log(),
        "alpha_divergence": lambda r: r.exp() ** (0.5 - 1) / (0.5 - 1),  # TRL's default coefficient is 0.5
    }[divergence]
    if divergence == "alpha_divergence":
        assert trainer.f_alpha_divergence_coef == 0.5
    z = 0.5 * (f(ratios[0]) - f(ratios[1]))
    p, w = inputs["preference_prob"], inputs["weight"]
    expected = pair_losses(method, z, 0.9 * p + 0.1 * (1 - p), w).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(trainer.model), gradients(policy), rtol=1e-4)
    brier = (z.sigmoid() - p).square().mean()
    assert trainer._metrics["train"]["rewards/brier"] == pytest.approx([brier.item()], rel=1e-4)


@pytest.mark.parametrize(
    ("p", "delta", "loss", "dpo", "slope"),
    [
        (1.0, 2.0, 0.598139, 0.598139, -0.045017), (0.8, 2.0, 0.638139, 0.598139, -0.025017),
        (0.8, -3.0, 0.794355, 0.854355, -0.037444), (0.5, 2.0, 0.698139, 0.598139, 0.004983),
        (0.9, 5.0, 0.524077, 0.474077, -0.027754), (0.8, 13.862944, 0.500402, 0.223144, 0.0),
    ],
)  # fmt: skip
def test_golden_values(p, delta, loss, dpo, slope, saved, tmp_path):
    """The worked table at beta = 0.1: the trainer's step on a model that answers with the margin asked for."""
    trainer = trainer_of(
        *SPCE, tmp_path, saved, table(preference_prob=[p] * 8), beta=0.1, precompute_ref_log_probs=True
    )
    margin = torch.tensor(delta, requires_grad=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs |= dict.fromkeys(REFERENCE, torch.zeros(4))
    rows, length = inputs["input_ids"].shape

    def model(**kwargs):
        first = inputs["completion_mask"][:, 1:].argmax(1, keepdim=True)  # all of the margin on one token of an answer
        given = torch.zeros(rows, length - 1).scatter(1, first, 1.0)
        logp = torch.cat([given[: rows // 2] * margin, given[rows // 2 :] * 0])
        zeros = torch.zeros_like(given)
        out = trl.trainer.utils.FusedCausalLMOutput
        return out(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    found = trainer.compute_loss(model, inputs)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=2e-6)
    assert found.item() - (1 - p) * 0.1 * delta == pytest.approx(dpo, abs=2e-6)
    assert margin.grad.item() == pytest.approx(slope, abs=2e-6)


def test_exchanged_answers_and_complementary_probabilities_are_the_same(saved, tmp_path):
    swapped = table(preference_prob=[1 - p for p in P], weight=WEIGHT)
    swapped = swapped.rename_columns({"chosen": "x", "rejected": "chosen"}).rename_column("x", "rejected")
    for method in ("spce", "pso"):
        straight = fit(*SPCE, tmp_path, saved, table(preference_prob=P, weight=WEIGHT), method=method)
        other = fit(*SPCE, tmp_path, saved, swapped, method=method)
        for mine, theirs in zip(logged(other), logged(straight), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert logged(straight)[0][0] != pytest.approx(logged(straight)[-1][0], rel=1e-3)


def test_the_margin_that_is_learned_is_the_logit_of_p():
    margin = torch.zeros(3, requires_grad=True)
    p, beta = torch.tensor([0.8, 0.5, 0.3]), 0.1
    for _ in range(400):
        loss = pair_losses("spce", beta * margin, p, torch.ones(3)).sum()
        [slope] = torch.autograd.grad(loss, margin)
        margin = (margin - 200 * slope).detach().requires_grad_()
    torch.testing.assert_close(margin.detach(), p.logit() / beta, rtol=1e-3, atol=1e-3)


def test_pairs_without_strength_or_weight_teach_nothing(saved, tmp_path):
    """p = 1/2 at the reference, PSO's weight at p = 1/2, and weight 0."""
    half, zero = table(preference_prob=[0.5] * 8), table(weight=[0.0] * 8)
    for rows, method, loss in ((half, "spce", 0.693147), (half, "pso", 0.0), (zero, "spce", 0.0)):
        trainer = fit(*SPCE, tmp_path, saved, rows, method=method, max_steps=2)
        assert logged(trainer) == [[pytest.approx(loss, abs=2e-6), pytest.approx(0, abs=1e-5)]] * 2


def test_accumulation_does_not_change_gradients(saved, tmp_path):
    found = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        rows = table(preference_prob=P, weight=WEIGHT)
        trainer = trainer_of(*SPCE, tmp_path, saved, rows, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        trainer.train()
        found += logged(trainer)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("setting", ["plain", "precomputed reference", "adapter"])
def test_resumed_losses_are_those_of_a_straight_run(setting, saved, tmp_path):
    options = {**SETTINGS[setting], "save_strategy": "steps", "save_steps": 2}
    rows = table(preference_prob=P, weight=WEIGHT)
    straight = fit(*SPCE, tmp_path, saved, rows, **options)
    resumed = fit(*SPCE, tmp_path, saved, rows, resume=str(tmp_path / "checkpoint-2"), **options)
    assert logged(resumed) == logged(straight) and len(logged(straight)) == 4
    card = (tmp_path / "README.md").read_text()
    assert "Online Self-Preferring" in card and "spce" in card


@pytest.mark.parametrize("setting", ["plain", "precomputed reference", "adapter"])
def test_no_logits_and_no_kernel_of_trl(setting, tmp_path, monkeypatch):
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)  # calling it is an error
    tiny(std=0.05, vocab_size=2000).save_pretrained(tmp_path / "model")
    model = patch(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), memory_budget=100_000)
    options = {"per_device_train_batch_size": 8, "model": model, **SETTINGS[setting]}
    trainer = trainer_of(*SPCE, tmp_path, tmp_path / "model", table(preference_prob=P), **options)
    inputs = next(iter(trainer.get_train_dataloader()))
    logits = inputs["input_ids"].numel() * 2000
    with Largest() as largest:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert 0 < largest.numel < logits / 5
    for model in filter(None, (trainer.model, trainer.ref_model)):
        assert patch_state(model).streamed >= 1 and patch_state(model).materialized == 0


def test_copies_of_the_model_run_their_own_weights(saved, tmp_path):
    """Before and after the first step; TRL's forward would run the original's."""
    trainer = trainer_of(*SPCE, tmp_path, saved)
    inputs = next(iter(trainer.get_train_dataloader()))
    for _ in range(2):
        clone = copy.deepcopy(trainer.model)
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.zero_()
            ids, labels = inputs["input_ids"], inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            assert clone(input_ids=ids).logits.abs().max() == 0
            out = clone(input_ids=ids, labels=labels, fused_lm_head=True)
        expected = torch.tensor(1 / V).log().expand(int(out.label_mask.sum()))
        torch.testing.assert_close(out.log_probs[out.label_mask], expected)
        trainer.compute_loss(trainer.model, inputs)


def test_conversations_streams_and_evaluation(saved, tmp_path):
    """The columns come through every way of feeding the trainer; evaluation counts them too."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = lambda role, texts: [[{"role": role, "content": text}] for text in texts]  # noqa: E731
    columns = {"chosen": talk("assistant", CHOSEN), "rejected": talk("assistant", REJECTED), "preference_prob": P}
    rows = datasets.Dataset.from_dict({"prompt": talk("user", PROMPTS), **columns})
    config = SPCEConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_steps=1, save_strategy="no", bf16=False, learning_rate=1e-2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(saved)
    parts = {"train_dataset": rows.to_iterable_dataset(), "eval_dataset": rows}
    trainer = SPCETrainer(model, args=config, processing_class=tokenizer, **parts)
    trainer.train()
    expected = torch.tensor(P[:4]).sub(0.5).square().mean()  # the first step is at the reference
    assert logged(trainer, "rewards/brier")[0] == pytest.approx([expected.item()], rel=1e-5)
    found = trainer.evaluate()
    assert 0 < found["eval_rewards/brier"] < 1 and found["eval_loss"] != pytest.approx(0.693147, abs=1e-5)


def test_evaluation_of_a_given_dataset_with_precomputed_references(saved, tmp_path):
    """TRL then runs the collator over it once more: its columns must not reach the model."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), peft.LoraConfig(**LORA))
    trainer = trainer_of(*SPCE, tmp_path, saved, model=model, precompute_ref_log_probs=True)
    found = trainer.evaluate(table(preference_prob=P))
    assert found["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_scores_meet_at_the_limits():
    r = torch.linspace(-2, 2, 9)
    near = scores_of("alpha_divergence", 1 + 1e-4)(r)
    torch.testing.assert_close(near, scores_of("alpha_divergence", 1.0)(r), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores_of("alpha_divergence", 0.0)(r), scores_of("forward_kl", 0.0)(r))
    assert F.softplus(scores_of("alpha_divergence", 3.0)(torch.tensor(1e4))).isfinite()


def test_refusals(saved, tmp_path):
    for options, match in (
        ({"method": "ppo"}, r"method is 'ppo': choose 'spce' or 'pso'"),
        ({"label_smoothing": 0.6}, r"label_smoothing is 0.6"),
        ({"loss_type": "hinge"}, r"loss_type is \['hinge'\].*trl.DPOTrainer"),
        ({"loss_type": "sft"}, r"loss_type is \['sft'\]"),
        ({"loss_type": ["sigmoid", "ipo"]}, r"loss_type"),
        ({"use_weighting": True}, r"use_weighting is True"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer_of(*SPCE, tmp_path, saved, **options)
    for column, values in (
        ("preference_prob", [1.0] * 7 + [1.2]), ("preference_prob", [1.0] * 7 + [float("nan")]),
        ("preference_prob", [None] * 8), ("preference_prob", ["strong"] * 8), ("weight", [1.0] * 7 + [-1.0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"column {column} has {values[-1]!r}: give a number from 0 to"):
            trainer_of(*SPCE, tmp_path, saved, table(**{column: values}))
    assert set(COLUMNS) == {"preference_prob", "weight"}


def test_every_evaluation_has_its_own_names(saved, tmp_path):
    trainer = trainer_of(*SPCE, tmp_path, saved, table(preference_prob=P))
    found = trainer.evaluate({"a": table(preference_prob=P), "b": table(preference_prob=[0.9] * 8)})
    expected = torch.tensor(P).sub(0.5).square().mean().item()  # the policy is still the reference
    assert found["eval_a_rewards/brier"] == pytest.approx(expected, rel=1e-4)
    assert found["eval_b_rewards/brier"] == pytest.approx(0.16, rel=1e-4) and "eval_rewards/brier" not in found
    tested = trainer.predict(trainer._prepare_dataset(table(), trainer.processing_class, trainer.args, "eval"))
    assert tested.metrics["test_rewards/brier"] == pytest.approx(0.25, rel=1e-4), "p is 1 without the column"
    with pytest.raises(ValueError, match=r"args is a DPOConfig: SPCETrainer takes a hf_xent\.SPCEConfig"):
        trainer_of(SPCETrainer, trl.DPOConfig, tmp_path, saved)


def test_a_compiled_policy_trains_as_it_does_without(tmp_path):
    """TRL's fused head, which makes no logits either, takes its place; the second loss is of a trained policy."""
    tiny(std=0.05, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled, plain = (fit(*SPCE, tmp_path, tmp_path / "model", max_steps=2, **more) for more in (options, {}))
    torch.testing.assert_close(logged(compiled, "loss"), logged(plain, "loss"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("chosen"), "the data has no column chosen, but prompt, rejected"),
        (lambda rows: rows.map(lambda row: {"prompt": "the cat " * 50}), "no row is left: .*max_length"),
        (
            lambda rows: rows.remove_columns("chosen").add_column("chosen", [1] * 8),
            "has a int in column chosen: .*text",
        ),
        (lambda rows: rows.remove_columns("chosen").add_column("chosen", [None, *CHOSEN[1:]]), "has None in .*chosen"),
        (lambda rows: rows.select([]), "train_dataset has no rows"),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name(saved, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(*SPCE, tmp_path, saved, change(table()), max_length=20)


def test_what_trl_would_load_by_name_is_asked_for(saved, tmp_path):
    with pytest.raises(ValueError, match=r"model has no name from which .* pass processing_class and ref_model"):
        trainer_of(*SPCE, tmp_path, saved, model=tiny())
    with pytest.raises(ValueError, match="use_liger_kernel is True"):
        trainer_of(*SPCE, tmp_path, saved, use_liger_kernel=True)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="processing_class has no eos_token"):
        SPCETrainer(
            tiny(), processing_class=tokenizer, train_dataset=table(), args=SPCEConfig(str(tmp_path), bf16=False)
        )
