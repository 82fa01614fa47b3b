"""DistillationTrainer: against dense logits of both models written down, and what a run must repeat to the bit."""

import itertools
import json
import re
import shutil
import warnings
from functools import partial
from importlib.util import find_spec

import datasets
import peft
import pytest
import torch
import trl
from accelerate import Accelerator
from packaging.version import Version
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_xent
from hf_xent import cli
from hf_xent.hub import validate
from hf_xent.lazy import next_token_labels
from hf_xent.patching import lazily, patch, patch_state
from hf_xent.teachers import LocalTeacher, write_cache
from hf_xent.teachers.tokens import tokenized
from hf_xent.teachers.unadapted import UnadaptedTeacher
from hf_xent.trainers import DistillationConfig, DistillationTrainer, StreamedSFTConfig
from hf_xent.trainers.on_policy import Draw, prompts_of, sampled, whole
from support.models import V, assert_same_gradients, gradients, tiny
from support.models import batch as tokens_and_labels
from support.oracle import Largest, assert_no_worse
from support.ranks import run_ranks
from support.sharded import ZERO, in_fsdp1, in_fsdp2
from test_sft import TEXTS, chats, texts, tokenizer

pytestmark = [
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="TRL has the fused head since 1.16"),
    pytest.mark.usefixtures("without_progress_bars"),
]


def answers():
    """Prompts with completions."""
    return datasets.Dataset.from_dict(
        {"prompt": [f"{x} the" for x in TEXTS], "completion": [f" {x}" for x in TEXTS[::-1]]}
    )


def teacher_model(dtype=torch.float32, **changes):
    """Another architecture of another hidden size, over the same vocabulary."""
    return tiny("gpt2", std=0.3, dtype=dtype, n_embd=24, **changes)


def trainer_of(folder, rows, model=None, teacher=None, **options):
    common = {
        "max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "optim": "sgd", "learning_rate": 1e-1, "save_strategy": "no",
        "max_length": 32, "max_grad_norm": 0.0, "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    model = tiny(std=0.3) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own fields are deprecated in transformers
        args = DistillationConfig(output_dir=str(folder), **{**common, **options})
        teacher = teacher_model() if teacher is None else teacher
        return DistillationTrainer(
            model, teacher, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
        )


def fit(*args, resume=None, **options):
    trainer = trainer_of(*args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batch_of(trainer):
    """All rows, as the collator makes a batch of them."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def divergences(name, z, y, heat, beta=0.5):
    """D(teacher, student) per token of dense logits [N, V], from the definitions."""
    q, p = (z / heat).softmax(-1), (y / heat).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if name == "skew_kl":
        return kl(p, 0.1 * p + 0.9 * q)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p)}.get(
        name, lambda: (p - q).abs().sum(-1) / 2
    )()


def dense(student, teacher, batch, name, heat=1.0, ce=0.0, **options):
    """The mean loss of dense logits over weighted labels, and the mean divergence over all of them."""
    inputs = {k: x for k, x in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        y = teacher(**inputs, use_cache=False).logits[:, :-1]
    z, labels = student(**inputs, use_cache=False).logits[:, -y.shape[1] - 1 : -1], batch["labels"][:, 1:]
    weights = batch.get("token_weights", torch.ones(batch["labels"].shape))[:, 1:].to(z.dtype)
    keep = (labels != -100) & (weights > 0)
    found = divergences(name, z[keep], y[keep].to(z.dtype), heat, **options)
    nll = F.cross_entropy(z[keep], labels[keep], reduction="none")
    loss = (1 - ce) * heat**2 * found + ce * nll
    return (loss * weights[keep]).sum() / weights[keep].sum(), found.mean(), nll.mean()


def with_lora():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny(std=0.3), config)


def with_prompt_tuning():
    torch.manual_seed(0)
    return peft.get_peft_model(tiny(std=0.3), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


CASES = {
    "text": ({"objective": "forward_kl", "temperature": 2.0}, texts, tiny),
    "mixed": ({"objective": "forward_kl:temperature=0.5", "ce_weight": 0.3}, answers, tiny),
    "patched before": ({"objective": "reverse_kl"}, answers, lambda std: patch(tiny(std=std), loss="focal")),
    "packed": ({"objective": "jsd:beta=0.2", "packing": True}, texts, tiny),
    "padding-free": ({"objective": "total_variation", "padding_free": True, "max_length": None}, answers, tiny),
    "chat": ({"objective": "reverse_kl", "assistant_only_loss": True, "max_length": None}, chats, tiny),
    "softcap": ({"objective": "skew_kl"}, texts, lambda std: tiny("gemma2 softcap", std=std)),
    "LoRA": ({"objective": "jsd", "temperature": 3.0, "ce_weight": 0.5}, texts, lambda std: with_lora()),
    "prompt tuning": ({}, lambda: texts(loss_weight=[1.0, 2.0, 0.5, 0.5] * 2), lambda std: with_prompt_tuning()),
    "weights": ({"objective": "forward_kl"}, lambda: texts(loss_weight=[1.0, 2.0, 0.0, 0.5] * 2), tiny),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_dense_logits(tmp_path, case):
    options, rows, model = CASES[case]
    trainer = trainer_of(tmp_path, rows(), model(std=0.3), **options)
    batch = batch_of(trainer)
    assert ("attention_mask" in batch) != (case in ("packed", "padding-free"))
    trainer.model.train()
    with trainer._step(training=True):
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    found, ours, means = trainer.objective, gradients(trainer.model), trainer._means(True)
    name, _, beta = options.get("objective", "forward_kl").partition(":beta=")
    expected, divergence, nll = dense(
        hf_xent.unpatch(trainer.model), teacher_model(), batch, name.partition(":")[0], found.temperature,
        options.get("ce_weight", 0.0), **({"beta": float(beta)} if beta else {}),
    )  # fmt: skip
    expected.backward()
    assert_same_gradients(ours, gradients(trainer.model), rtol=5e-5)
    assert means["divergence"] == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert means["perplexity"] == pytest.approx(float(nll.detach().exp()), rel=1e-5)


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_an_evaluation_is_that_of_dense_logits(tmp_path, ce_weight):
    trainer = trainer_of(tmp_path, answers(), objective="reverse_kl", temperature=2.0, ce_weight=ce_weight)
    batch, found = batch_of(trainer), trainer.evaluate()
    loss, divergence, nll = dense(tiny(std=0.3), teacher_model(), batch, "reverse_kl", 2.0, ce_weight)
    assert found["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["eval_divergence"] == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert found["eval_perplexity"] == pytest.approx(float(nll.detach().exp()), rel=1e-5)
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= found.keys() and "eval_on_policy_share" not in found


def test_accumulation_does_not_change_a_step(tmp_path):
    """The rows have different numbers of labels, so a mean of means would be another number."""
    found = []
    for size, accumulation in ((8, 1), (1, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = fit(tmp_path, answers(), objective="jsd", ce_weight=0.2, max_steps=2, **sizes)
        found.append(trainer)
    for ours, theirs in zip(*map(logs_of, found), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-5)
    for ours, theirs in zip(*(trainer.model.parameters() for trainer in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_policy", [0.0, 0.6])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, on_policy):
    """To the bit, with dropout, and with samples of which some come before the interruption and some after."""
    sampling = {"on_policy": on_policy, "max_new_tokens": 4} if on_policy else {}
    options = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch",
        "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, **sampling,
    }  # fmt: skip
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        torch.manual_seed(7)  # a resumed process starts with other generators than the first one
        model = tiny("llama", std=0.3, attention_dropout=0.1)
        runs.append(fit(tmp_path, answers(), model, resume=resume, **options))
    shares = [entry.get("on_policy_share") for entry in logs_of(runs[0])]
    assert not on_policy or (any(shares[:3]) and any(shares[3:]) and not all(x == 1 for x in shares))
    for ours, theirs in zip(*map(logs_of, runs), strict=True):
        assert {**ours, "num_tokens": 0} == {**theirs, "num_tokens": 0}
    for ours, theirs in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(ours, theirs)
    saved = [path.name for path in (tmp_path / "checkpoint-3").glob("*.safetensors")]
    assert saved == ["model.safetensors"], "the student alone"


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=str)
def test_samples_take_the_place_of_completions(tmp_path, options):
    """Prompts stay; new tokens are labels, up to an end token; the divisor counts them; other draws, other tokens."""
    trainer = trainer_of(tmp_path, answers(), tiny(std=0.3), on_policy=1.0, max_new_tokens=7, **options)
    model, given = trainer.model, [batch_of(trainer)] * 3
    end = model.generation_config.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[end] += 2 * model.lm_head.weight[end].sign()  # so that some completions end
    before = torch.random.get_rng_state()
    batches, items = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    assert torch.equal(before, torch.random.get_rng_state()) and model.training is False
    assert len(batches) == 2 and int(items) == sum((batch["labels"] != -100).sum() for batch in batches)
    prompts, lengths, ended = prompts_of(given[0]), [], 0
    assert [tokenizer().decode(prompt) for prompt in prompts] == [f" {prompt}" for prompt in answers()["prompt"]]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        for prompt, ids, mask, labels in zip(prompts, *batch.values(), strict=True):
            size = int(mask.sum())
            new = ids[len(prompt) : size]
            assert ids[: len(prompt)].tolist() == prompt and not mask[size:].any() and 1 <= len(new) <= 7
            assert labels.tolist() == [-100] * len(prompt) + new.tolist() + [-100] * (len(ids) - size)
            ended += end in new
            assert end not in new[:-1] and (len(new) == 7 or new[-1] == end)
            lengths.append(len(new))
    assert 0 < ended < len(lengths) and batches[0]["labels"].tolist() != batches[1]["labels"].tolist()
    again, _ = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    assert all(torch.equal(x["labels"], y["labels"]) for x, y in zip(batches, again, strict=True))
    means = trainer._means(True)
    assert means["on_policy_share"] == 1 and means["generated_length"] == pytest.approx(sum(lengths) / len(lengths))
    rest, _ = trainer.get_batch_samples(iter(given[:1]), 2, torch.device("cpu"))
    assert len(rest) == 1, "the end of an epoch"


def test_the_share_is_that_of_the_batches():
    draws = [Draw(3, step, batch) for step in range(100) for batch in range(5)]
    assert 0.25 < sum(draw.replaces(0.3) for draw in draws) / len(draws) < 0.35
    assert not any(draw.replaces(0.0) for draw in draws) and all(draw.replaces(1.0) for draw in draws)
    seeds = {draw.seed_of(process) for draw, process in itertools.product(draws, range(2))}
    assert len(seeds) == 2 * len(draws) and max(seeds) < 2**63


def test_texts_without_prompts_are_sampled_from_their_first_token(tmp_path):
    trainer = trainer_of(tmp_path, texts(), on_policy=1.0, max_new_tokens=2)
    batch = batch_of(trainer)
    assert prompts_of(batch) == batch["input_ids"][:, :1].tolist()
    batch["labels"][3:] = -100
    assert len(prompts_of(batch)) == 3, "no samples for what has no labels"


def test_the_teacher_stays_as_it_is(tmp_path):
    """In evaluation mode and without gradient while it answers, whatever its mode, and it is not in the student."""
    teacher = teacher_model(resid_pdrop=0.5, attn_pdrop=0.5).train()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    trainer = fit(tmp_path, texts(), teacher=teacher, objective="jsd")
    expected, *_ = dense(tiny(std=0.3), teacher_model(), batch_of(trainer), "jsd")
    assert logs_of(trainer)[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in trainer.model.parameters()}


def test_a_student_learns_from_itself_without_adapters(tmp_path):
    found = []
    for teacher in ("base", tiny(std=0.3)):
        trainer = fit(tmp_path, answers(), with_lora(), teacher, max_steps=2, objective="reverse_kl")
        found.append(trainer)
    assert found[0].card_facts == {"Teacher": "the student without its adapters"}
    for ours, theirs in zip(*map(logs_of, found), strict=True):
        assert ours["divergence"] > 1e-4
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for ours, theirs in zip(*(trainer.model.parameters() for trainer in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_auxiliary_loss_is_added(tmp_path):
    model = tiny("mixtral aux loss", std=0.3)
    trainer = fit(tmp_path, texts(), model)
    log = logs_of(trainer)[0]
    expected, *_ = dense(tiny("mixtral aux loss", std=0.3), teacher_model(), batch_of(trainer), "forward_kl")
    assert log["aux_loss"] > 0
    assert log["loss"] == pytest.approx(float(expected.detach()) + 0.5 * log["aux_loss"], rel=1e-4)


def test_no_logits_are_made(tmp_path):
    """Of neither model, in training, sampling apart, and in evaluation."""
    student, teacher = tiny(std=0.3, vocab_size=8 * V), teacher_model(vocab_size=8 * V)
    trainer = trainer_of(
        tmp_path, texts(), student, teacher, memory_budget=1 << 12, ce_weight=0.5, temperature=2.0, max_length=None
    )
    size = batch_of(trainer)["labels"].numel()
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        trainer.evaluate()
    assert largest.numel <= max(p.numel() for p in student.parameters()) < size * 8 * V
    assert patch_state(student).materialized == patch_state(teacher).materialized == 0


@pytest.mark.slow
def test_a_compiled_model_trains_as_it_does_without(tmp_path):
    found = []
    for options in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        trainer = fit(tmp_path, texts(), objective="jsd", ce_weight=0.3, max_steps=2, **options)
        found.append([(entry["loss"], entry["divergence"]) for entry in logs_of(trainer)])
        torch.compiler.reset()
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=0)


def test_bfloat16_is_no_worse_than_torch(tmp_path):
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        teacher = teacher_model().to(dtype)
        trainer = trainer_of(tmp_path, texts(), tiny(std=0.3).to(dtype), teacher, ce_weight=0.25)
        batch = batch_of(trainer)
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        ours = gradients(trainer.model)["lm_head.weight"]
        loss, *_ = dense(hf_xent.unpatch(trainer.model), hf_xent.unpatch(teacher), batch, "forward_kl", ce=0.25)
        loss.backward()
        found[dtype] = ours, gradients(trainer.model)["lm_head.weight"]
    (ours, torchs), (double, truth) = found[torch.bfloat16], found[torch.float64]
    torch.testing.assert_close(double, truth, rtol=1e-9, atol=1e-12)
    assert_no_worse(ours, torchs, truth)


def on_a_rank(rank, folder):
    """A step of both ranks together, on their own samples too; ZeRO-3 last: it changes how models are made."""
    trainer = fit(folder, answers(), per_device_train_batch_size=4, ce_weight=0.3)
    sampled = fit(folder, answers(), per_device_train_batch_size=4, on_policy=1.0, max_new_tokens=4)
    batches, items = sampled.get_batch_samples(iter([batch_of(sampled)]), 1, torch.device("cpu"))
    return {
        "log": logs_of(trainer)[0],
        "parameters": [p.detach() for p in trainer.model.parameters()],
        "kind": type(trainer.model_wrapped).__name__,
        "items": int(items),
        "labels": batches[0]["labels"].tolist(),
        "sampled": [float(p.detach().sum()) for p in sampled.model.parameters()],
        "FSDP": {kind: under_fsdp(rank, folder, wrap) for kind, wrap in SHARDED.items()},
        "split": split_heads(folder),
        "ZeRO-3": partitioned(folder) if find_spec("deepspeed") else None,
    }


def loaded(folder, name):
    """A model; from a file, since ZeRO-3 partitions models as they are made, and their random numbers are others."""
    model = AutoModelForCausalLM.from_pretrained(folder / name.removesuffix(" with LoRA"))
    if not name.endswith("LoRA"):
        return model
    return peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)


PARTITIONED = {
    "names": {"model": "student", "teacher": "teacher", "ce_weight": 0.3},
    "objects": {"model": partial(loaded, name="student"), "teacher": partial(loaded, name="teacher")},
    "base": {"model": partial(loaded, name="student with LoRA"), "teacher": "base", "ce_weight": 0.3},
    "itself": {"model": partial(loaded, name="student"), "teacher": "itself", "ce_weight": 0.3},
    "on policy": {"model": "student", "teacher": "teacher", "on_policy": 1.0, "max_new_tokens": 4},
}


def three_steps(folder, model, teacher, **options):
    """Logs of three steps and the loss of an evaluation, and how often logits were made."""
    named = lambda x: x(folder) if callable(x) else str(folder / x)  # noqa: E731
    model = named(model)
    teacher = {"base": "base", "itself": model}.get(teacher) or named(teacher)
    trainer = fit(folder, answers(), model, teacher, max_steps=3, **options)
    logs = [[entry[name] for name in ("loss", "divergence", "grad_norm")] for entry in logs_of(trainer)]
    return [*logs, [trainer.evaluate()["eval_loss"]]], patch_state(trainer.model).materialized


SHARDED = {
    "FSDP1": partial(in_fsdp1, apart=()),
    "FSDP1, head apart": partial(in_fsdp1, apart=("lm_head",)),
    "FSDP2": in_fsdp2,
}


def under_fsdp(rank, folder, wrap=lambda model: model):
    """Losses, summed over ranks, with a teacher that is sharded and with the student's base; this rank's samples.

    The trainer's parts, not the trainer: accelerate prepares no model for FSDP on a CPU.
    """
    ids, labels = tokens_and_labels(rows=4)
    half = {"input_ids": ids[2 * rank :][:2], "labels": labels[2 * rank :][:2]}
    student, teacher = (wrap(patch(loaded(folder, name))) for name in ("student", "wide teacher"))
    found = {"teacher": loss_of(student, LocalTeacher(teacher), **half)}
    with whole(student, Accelerator(cpu=True)) as model:
        samples = sampled(model, half, tokens=5, temperature=1.0, seed=rank, pad=0)
    adapted = UnadaptedTeacher(loaded(folder, "student with LoRA"))
    if wrap is not in_fsdp2:
        adapted.model = wrap(adapted.model)
        found["base"] = loss_of(adapted.model, adapted, **half)
    return found, samples["input_ids"]


def split_heads(folder):
    """The loss of a student that is split by its vocabulary, with a whole teacher, and with one that is split, too."""
    ids, labels = tokens_and_labels(rows=4)
    split = partial(AutoModelForCausalLM.from_pretrained, tp_plan="auto")
    teachers = loaded(folder, "wide teacher"), split(folder / "wide teacher")
    return [loss_of(patch(split(folder / "student")), LocalTeacher(teacher), ids, labels) for teacher in teachers]


def loss_of(student, teacher, input_ids, labels):
    """The sum of the divergences over the labels of this rank's rows."""
    given = teacher.targets({"input_ids": input_ids})
    with lazily(student):
        logits = student(input_ids=input_ids).logits
    objective, labels = hf_xent.losses.get("jsd"), next_token_labels(labels)
    loss = logits.with_head(lambda hidden, head: objective(hidden, head, labels, num_items=1, teacher=given))
    loss.backward()
    return loss.detach()


def partitioned(folder):
    """The same of two ranks, with student and teacher partitioned by ZeRO-3."""
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3, **ZERO},
        "zero_allow_untested_optimizer": True,
    }
    more = {"deepspeed": settings, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return {name: three_steps(folder, **options, **more) for name, options in PARTITIONED.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    wide = tiny(std=0.3, hidden_size=48, head_dim=12)  # of a class that FSDP's units know
    for name, model in (("student", tiny(std=0.3)), ("teacher", teacher_model()), ("wide teacher", wide)):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    with_lora().save_pretrained(folder / "adapter")
    return folder, run_ranks(2, on_a_rank, folder, folder)


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_models_learn_and_sample_as_whole_ones(kind, ranks):
    folder, both = ranks
    for rank, found in enumerate(both):
        (losses, samples), (expected, same) = found["FSDP"][kind], under_fsdp(rank, folder)
        assert torch.equal(samples, same)
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name])


def test_models_that_are_split_by_their_vocabulary_learn_as_whole_ones(ranks):
    folder, both = ranks
    ids, labels = tokens_and_labels(rows=4)
    expected = loss_of(patch(loaded(folder, "student")), LocalTeacher(loaded(folder, "wide teacher")), ids, labels)
    for rank in both:
        for loss in rank["split"]:
            torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", PARTITIONED)
def test_models_partitioned_by_zero3_learn_as_whole_ones(name, ranks):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    folder, (first, second) = ranks
    found, materialized = first["ZeRO-3"][name]
    assert found == second["ZeRO-3"][name][0] and materialized == 0
    if name == "on policy":  # ranks sample on their own
        assert all(loss == pytest.approx(divergence) and norm > 0 for loss, divergence, norm in found[:3])
    else:
        expected, _ = three_steps(folder, **PARTITIONED[name])
        for ours, one in zip(found, expected, strict=True):
            assert ours == pytest.approx(one, rel=1e-4, abs=1e-6)  # the divergence is a difference of losses


def test_two_ranks_are_one(ranks, tmp_path):
    _, (first, second) = ranks
    alone = fit(tmp_path, answers(), ce_weight=0.3)
    log = logs_of(alone)[0]
    assert first["kind"] == "DistributedDataParallel" and first["items"] == second["items"]
    for name in ("loss", "divergence", "perplexity", "entropy"):
        assert first["log"][name] == pytest.approx(log[name], rel=1e-5), name
    for ours, theirs, expected in zip(first["parameters"], second["parameters"], alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours, theirs)
    assert first["labels"] != second["labels"] and first["sampled"] == second["sampled"]
    assert first["items"] == sum(sum(x != -100 for x in row) for rank in (first, second) for row in rank["labels"])


def test_a_card_names_method_teacher_and_objective(tmp_path):
    trainer = fit(tmp_path, texts(), objective="jsd:beta=0.25", temperature=2.0)
    trainer.evaluate()
    trainer.create_model_card(model_name="small fox", license="mit")
    card = validate(tmp_path)
    assert {"distillation", "hf_xent"} <= set(card.data.tags) and card.data.model_name == "small fox"
    for text in ("arXiv:1503.02531", "arXiv:2306.13649", "`beta`: 0.25", "Teacher: GPT2LMHeadModel", "divergence"):
        assert text in card.text, text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "focal"}, "loss is 'focal', but the loss is a divergence from the teacher: choose objective"),
        ({"objective": "focal"}, "objective is 'focal', which has no teacher: choose one of forward_kl"),
        ({"objective": "nonesuch"}, "loss is 'nonesuch': choose one of"),
        ({"objective": "jsd:temperature=2", "temperature": 3.0}, "set temperature once"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"ce_weight": 1.5}, "ce_weight is 1.5"),
        ({"on_policy": -0.1}, "on_policy is -0.1"),
        ({"tail": 1e-3}, "tail is 0.001, but divergences have exact gradients only"),
        ({"max_new_tokens": 5}, "max_new_tokens is 5, but on_policy is 0"),
        ({"sampling_temperature": 0.5}, "sampling_temperature is 0.5, but on_policy is 0"),
        ({"on_policy": 0.5, "packing": True}, "on_policy is 0.5, but packing is True"),
        ({"teacher_weights": ["much"]}, "teacher_weights is ['much']: give numbers"),
        ({"teacher": "base"}, "teacher is 'base', but the student is a LlamaForCausalLM without adapters"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(tmp_path, texts(), **options)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="args is a StreamedSFTConfig: DistillationTrainer takes"):
        DistillationTrainer(
            tiny(), teacher_model(), StreamedSFTConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=None)
        )
    with pytest.raises(ValueError, match=r"the teacher's head has 101 tokens but the student's 97"):
        fit(tmp_path, texts(), teacher=teacher_model(vocab_size=101))
    rows = answers().add_column("loss_weight", [1.0] * 8)
    with pytest.raises(ValueError, match="on_policy replaces a batch by samples, but it has token_weights"):
        fit(tmp_path, rows, on_policy=0.5)


@pytest.fixture
def folder(tmp_path):
    """A tiny teacher, a tiny student and their tokenizer, on disk, and prompts with completions."""
    for name, model in {"teacher": teacher_model(), "student": tiny(std=0.3, num_hidden_layers=1)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    rows = datasets.Dataset.from_dict({"text": TEXTS, **answers().to_dict()})
    rows.to_json(tmp_path / "rows.jsonl")
    return tmp_path


def run_command(folder, *more, teacher="teacher"):
    """The summary of `hf-xent distill train`, and the losses and logs of its steps."""
    arguments = [
        *("distill", "train", folder / "student", "--teacher", folder / teacher, "--dataset", folder / "rows.jsonl"),
        *("--output", folder / "out", "--batch-size", 2, "--save-steps", 2, "--learning-rate", 0.01, "--json", *more),
    ]
    result = CliRunner().invoke(cli.app, [str(x) for x in arguments], catch_exceptions=False)
    (outcome,) = json.loads((folder / "out" / "results.json").read_text())["outcomes"]
    return json.loads(result.stdout), outcome


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_command_trains_and_resumes(folder):
    sampling = ("--column", "completion", "--on-policy", 0.5, "--max-new-tokens", 3)
    options = ("--steps", 4, "--objective", "jsd:beta=0.3", "--ce-weight", 0.1, *sampling)
    teacher_model(vocab_size=V + 4).save_pretrained(folder / "teacher")  # the same tokens, and rows that are of none
    summary, outcome = run_command(folder, *options)
    assert summary["after"]["divergence"] < summary["before"]["divergence"] and summary["steps"] == 4
    assert {"on_policy_share", "divergence"} <= outcome["logs"][0].keys() and len(outcome["losses"]) == 4
    assert "Teacher: a local model" in (folder / "out" / "README.md").read_text()
    shutil.rmtree(folder / "out" / "checkpoint-4")
    again, resumed = run_command(folder, *options, "--resume")
    assert resumed["losses"] == outcome["losses"] and again["after"] == summary["after"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_command_reads_chats(folder):
    """In a column of any name; what a cache says of them is found in training."""
    with pytest.raises(ValueError, match="assistant_only_loss=True"):
        run_command(folder, "--assistant-only-loss")
    rows, found = folder / "rows.jsonl", []
    for column in ("messages", "talks"):
        datasets.Dataset.from_dict({column: chats()["messages"]}).to_json(rows)
        found.append(run_command(folder, "--column", column, "--steps", 2, "--assistant-only-loss")[0]["after"])
    assert found[0] == found[1] and found[0]["divergence"] > 0
    command = ["distill", "cache", folder / "teacher", rows, "--column", "talks", "--kind", "hidden"]
    command += ["--dtype", "float32", "--output", folder / "cache", "--json"]
    CliRunner().invoke(cli.app, [*map(str, command)], catch_exceptions=False)
    more = ("--column", "talks", "--steps", 2, "--assistant-only-loss")
    assert run_command(folder, *more, teacher="cache")[0]["after"] == pytest.approx(found[0])


def test_the_command_names_what_is_missing(folder):
    with pytest.raises(ValueError, match="teacher is not given: name a model, a cache or a server"):
        CliRunner().invoke(cli.app, ["distill", "train", str(folder / "student")], catch_exceptions=False)
    with pytest.raises(ValueError, match="ce_weight is 0, but with new adapters the student is its teacher 'base'"):
        arguments = ["distill", "train", str(folder / "student"), "--teacher", "base", "--lora", "4"]
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    with pytest.raises(ValueError, match="on_policy is 0, so nothing is sampled"):
        run_command(folder, "--max-new-tokens", 3)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_cache_is_a_teacher_but_not_of_samples(folder):
    """Hidden states that were stored are those of the model, packed or not."""
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    stored = tokenized(rows, tokenizer(), max_length=None)
    write_cache(LocalTeacher(teacher), stored, folder / "cache", kind="hidden", dtype="float32", tokenizer=tokenizer())
    for options in ({}, {"packing": True}):
        found = [
            logs_of(fit(folder, rows, teacher=source, **options))[0]["loss"]
            for source in (str(folder / "cache"), teacher)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    several = trainer_of(folder, rows, teacher=[str(folder / "cache"), str(folder / "teacher")])
    assert several.card_facts == {"Teacher": "0.5 a cache + 0.5 a local model"}
    with pytest.raises(ValueError, match=r"on_policy is 0\.5, but a teacher is a cache"):
        trainer_of(folder, rows, teacher=[str(folder / "cache"), teacher], on_policy=0.5)


def test_several_teachers_have_weights(tmp_path):
    teachers = [teacher_model(), tiny(std=0.3, num_hidden_layers=1)]
    trainer = fit(tmp_path, texts(), teacher=teachers, teacher_weights=[3.0, 1.0], objective="reverse_kl")
    batch = batch_of(trainer)
    each = [float(dense(tiny(std=0.3), hf_xent.unpatch(x), batch, "reverse_kl")[0].detach()) for x in teachers]
    assert logs_of(trainer)[0]["loss"] == pytest.approx(0.75 * each[0] + 0.25 * each[1], rel=1e-5)
    assert "0.75 GPT2LMHeadModel + 0.25 LlamaForCausalLM" in trainer.card_facts["Teacher"]
