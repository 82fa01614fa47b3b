"""TRL's own trainers for distillation with patched models: the losses and weights of TRL's own, without logits."""

import os
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import trl
from packaging.version import Version

import hf_xent
from hf_xent.ops import Head
from hf_xent.patching import patch_state
from support.models import V, tiny, tiny_tokenizer
from support.oracle import Largest

pytestmark = [
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="written for TRL 1.16 and later"),
    pytest.mark.usefixtures("without_progress_bars"),
]

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
TEXTS = ["the quick brown fox jumps", "over", "the lazy dog the quick", "fox over the dog jumps over the lazy fox"]
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def chats():
    turns = [
        [{"role": "user", "content": x}, {"role": "assistant", "content": TEXTS[-1 - i]}] for i, x in enumerate(TEXTS)
    ]
    return datasets.Dataset.from_dict({"messages": turns})


def models(patched=(False, False)):
    """A student and a wider-spread teacher of another width; those patched compute four rows of logits at a time."""
    pair = (
        tiny(std=0.1, num_hidden_layers=1),
        tiny(std=0.2, num_hidden_layers=1, hidden_size=24, intermediate_size=40),
    )
    for model, wanted in zip(pair, patched, strict=True):
        if wanted:
            hf_xent.patch(model, always=True, memory_budget=4 * 2 * 4 * V)
    return pair


def options_of(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 3,
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "optim": "sgd",
        "learning_rate": 0.1, "save_strategy": "no", "gradient_checkpointing": False, "lr_scheduler_type": "constant",
        **more,
    }  # fmt: skip


def trained(make, watched=False):
    """The trainer after its steps, its losses, and if `watched` the largest tensor of these steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own fields are deprecated in transformers
        trainer = make()
        largest = Largest()
        with largest if watched else nullcontext():
            trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row], largest.numel


def gkd(folder, patched=(False, False), callbacks=(), peft_config=None, watched=False, **options):
    """TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = models(patched)
    common = {"lmbda": 0.0, "max_new_tokens": 4, "max_length": 48}
    return trained(
        lambda: GKDTrainer(
            student,
            teacher_model=teacher,
            args=GKDConfig(**options_of(folder, **common | options)),
            train_dataset=chats(),
            processing_class=tokenizer(),
            callbacks=[*callbacks],
            peft_config=peft_config,
        ),
        watched,
    )


def assert_same_training(ours, stock):
    (trainer, found, _), (other, expected, _) = ours, stock
    assert len(found) == 3 and len(set(found)) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_of_two_patched_models_is_that_of_trl(beta, tmp_path):
    """On what the data has: no tensor of the steps has a row of the vocabulary for every token."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if beta == 1 else {}
    stock = gkd(tmp_path / "stock", beta=beta, watched=beta == 0.5, **options)
    ours = gkd(tmp_path / "ours", (True, True), beta=beta, watched=beta == 0.5, **options)
    assert_same_training(ours, stock)
    for model in (ours[0].model, ours[0].teacher_model):
        state = patch_state(model)
        assert state.materialized == 0 and state.streamed == 3 * options.get("gradient_accumulation_steps", 1)
    if beta == 0.5:
        tokens = 4 * 18  # of a padded batch
        assert ours[2] < 0.6 * tokens * V < (tokens - 4) * V <= stock[2]


def test_gkd_on_what_the_student_samples(tmp_path):
    """The same numbers are drawn, and sampling reads the logits of one token at a time."""
    stock = gkd(tmp_path / "stock", beta=0.5, lmbda=1.0)
    ours = gkd(tmp_path / "ours", (True, True), beta=0.5, lmbda=1.0)
    assert_same_training(ours, stock)
    assert patch_state(ours[0].teacher_model).materialized == 0 and patch_state(ours[0].model).streamed == 3


def test_gkd_with_a_callback_an_adapter_and_an_ordinary_teacher(tmp_path):
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    stock = gkd(tmp_path / "stock", beta=0.3, peft_config=config)
    ours = gkd(tmp_path / "ours", beta=0.3, peft_config=config, callbacks=[hf_xent.PatchCallback(always=True)])
    assert_same_training(ours, stock)


def on_policy(folder, patched=(False, False), change=lambda trainer: trainer, **options):
    """TRL's DistillationTrainer, after `change`."""
    common = {"max_completion_length": 4, "temperature": 2.0, "bf16": False}
    student, teacher = models(patched)
    prompts = datasets.Dataset.from_dict({"prompt": TEXTS})
    return trained(
        lambda: change(
            trl.DistillationTrainer(
                student,
                teacher_model=teacher,
                args=trl.DistillationConfig(**options_of(folder, **common | options)),
                train_dataset=prompts,
                processing_class=tokenizer(),
            )
        )
    )


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_distillation_with_our_kernels_is_that_of_trl(beta, tmp_path):
    """And so is TRL's own loss of models that are patched, which it does not call."""
    stock = on_policy(tmp_path / "stock", beta=beta)
    ours = on_policy(tmp_path / "ours", beta=beta, change=hf_xent.trainers.stream_distillation)
    assert_same_training(ours, stock)
    for name in ("entropy", "num_tokens"):
        assert len(logged(stock[0], name)) == 3
        torch.testing.assert_close(logged(ours[0], name), logged(stock[0], name), rtol=1e-4, atol=1e-5)
    state = patch_state(ours[0].model)
    assert state.streamed == 3 and state.materialized == 0
    if beta == 0.5:
        assert_same_training(on_policy(tmp_path / "patched", (True, True), beta=beta), stock)


def test_an_adapter_on_the_head_and_a_softcap_count(tmp_path):
    """TRL reads the head's weight alone. Some answers have ended, and some tokens are a tool's."""
    student, teacher = tiny("gemma2 softcap", tie_word_embeddings=False), tiny(std=0.3)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    student = peft.inject_adapter_in_model(config, student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own fields are deprecated in transformers
        args = trl.DistillationConfig(**options_of(tmp_path, beta=0.3, temperature=1.7))
    prompts = datasets.Dataset.from_dict({"prompt": TEXTS})
    trainer = hf_xent.trainers.stream_distillation(
        trl.DistillationTrainer(
            student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer()
        )
    )
    ids, kept = torch.randint(3, 90, (2, 9)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tools = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
    inputs = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:], "prompt_mask": torch.ones_like(ids[:, :4])}
    inputs |= {"completion_mask": kept, "tool_mask": tools, "num_items_in_batch": torch.tensor(7)}
    loss, entropy, count = trainer._compute_loss(student, inputs, torch.tensor(5.0))
    ours = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
    hf_xent.unpatch(student), hf_xent.unpatch(teacher)
    mask = torch.cat([torch.ones_like(ids[:, :4]), kept], 1)
    p, q = (
        (model(input_ids=ids, attention_mask=mask).logits[:, 3:-1] / 1.7).log_softmax(-1)
        for model in (student, teacher)
    )
    mixture = (0.7 * p.exp() + 0.3 * q.exp()).log()
    each = (0.3 * q.exp() * (q - mixture) + 0.7 * p.exp() * (p - mixture)).sum(-1)
    valid = (kept * tools).bool()
    expected = each[valid].sum() / 5
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(entropy, -(p.exp() * p).sum(-1)[valid].sum())
    assert count == 7 == valid.sum()
    theirs = torch.autograd.grad(expected, [p for p in student.parameters() if p.requires_grad])
    assert len(ours) == 6  # two matrices of each adapter: one on the head, and one in each of two layers
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_has_no_loss_to_stream_is_refused():
    with pytest.raises(ValueError, match=r"is a SimpleNamespace without _compute_loss: pass a trl\.Dist"):
        hf_xent.trainers.stream_distillation(SimpleNamespace())


@pytest.mark.parametrize(
    ("beta", "objective"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.3, "jsd:beta=0.3")], ids=str
)
def test_divergences_and_gradients_are_those_of_trls_kernel(beta, objective):
    """Which has no factor T^2."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    torch.manual_seed(2)
    hidden, weight, bias = (
        torch.randn(7, 5, requires_grad=True),
        torch.randn(61, 5, requires_grad=True),
        torch.randn(61),
    )
    bias.requires_grad_()
    second, its_weight, leaves, temperature = torch.randn(7, 4), torch.randn(61, 4), (hidden, weight, bias), 1.7
    each, entropy = ChunkedDivergenceFunction.apply(
        hidden, weight, bias, second, its_weight, None, beta, temperature, 0.5, 3.0, 2.0, None
    )
    expected = torch.autograd.grad((each * torch.arange(7)).sum(), leaves)
    loss, stats = hf_xent.losses.get(objective).compute(
        hidden,
        Head(weight, bias, scale=0.5, softcap=3.0).tempered(temperature),
        torch.zeros(7, dtype=torch.int64),
        teacher=(second, Head(its_weight, scale=2.0).tempered(temperature)),
        reduction="none",
        observe=("entropy",),
    )
    torch.testing.assert_close(loss, each)
    torch.testing.assert_close(stats.entropy, entropy)
    torch.testing.assert_close(torch.autograd.grad((loss * torch.arange(7)).sum(), leaves), expected)
