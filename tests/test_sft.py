"""StreamedSFTTrainer: TRL's own numbers without weights, and with them the weighted loss of dense logits."""

import warnings

import datasets
import pytest
import torch
import trl
from packaging.version import Version
from trl import SFTConfig, SFTTrainer

import hf_xent
from hf_xent.data.chat import chat_tokens
from hf_xent.patching import patch_state
from hf_xent.trainers import StreamedSFTConfig, StreamedSFTTrainer
from support.models import V, tiny, tiny_tokenizer
from support.oracle import Largest

FUSED = Version(trl.__version__) >= Version("1.16")
pytestmark = [
    pytest.mark.skipif(not FUSED, reason="TRL has the fused head since 1.16"),
    pytest.mark.usefixtures("without_progress_bars"),
]

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog the quick", "fox over the dog"] * 2
ROWS = [1.0, 2.0, 0.0, 0.5] * 2
# a generation prompt, markers for the assistant's masks, and an end of every turn
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>fox<s>{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}<s>dog{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>fox<s>{% endif %}"
)


def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def texts(**columns):
    return datasets.Dataset.from_dict({"text": TEXTS, **columns})


def chats(weights=(None, 0.0, None, 1.5), parts=False):
    """Chats of four turns, each with a weight or none."""
    rows = []
    for i in range(0, 8, 4):
        turns = [
            {"role": "assistant" if j % 2 else "user", "content": TEXTS[(i + j) % 8], "weight": weight}
            for j, weight in enumerate(weights)
        ]
        rows.append({"prompt": turns[:3], "completion": turns[3:]} if parts else {"messages": turns})
    return datasets.Dataset.from_list(rows * 2)


def trainer_of(folder, rows, kind=StreamedSFTTrainer, model=None, **options):
    common = {
        "max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "optim": "sgd", "learning_rate": 1e-2, "save_strategy": "no",
        "max_length": 16, "max_grad_norm": 0.0, "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    more = {name: options.pop(name) for name in ("loss", "compute_metrics", "data_collator") if name in options}
    config = StreamedSFTConfig if kind is StreamedSFTTrainer else SFTConfig
    model = tiny(std=0.05) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own fields are deprecated in transformers
        args = config(output_dir=str(folder), **{**common, **options})
        return kind(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(), **more)


def fit(*args, **options):
    trainer = trainer_of(*args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def logged(trainer):
    """Loss and gradient norm of the first step."""
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]


def batch_of(trainer):
    """All rows of the trainer, as its collator makes a batch of them."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def step_of_dense(batch, loss=None):
    """The loss of dense logits, weighted by hand, and parameters after the step."""
    model, weights = tiny(std=0.05), batch["token_weights"][:, 1:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    valid = (labels != -100) & (weights > 0)
    head = model.get_output_embeddings().weight.detach().clone()
    objective = hf_xent.losses.get(loss).bind(head)
    losses = objective.reference(logits[valid], labels[valid], weight=head)
    total = (losses * weights[valid]).sum() / weights[valid].sum()
    total.backward()
    return float(total.detach()), [p.detach() - 1e-2 * p.grad for p in model.parameters()]


OPTIONS = [
    {},
    {"packing": True},
    {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    {"packing": True, "packing_strategy": "wrapped"},
    {"padding_free": True, "max_length": None},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_weights_it_is_trls(tmp_path, options):
    ours, theirs = (fit(tmp_path, texts(), kind, **options) for kind in (StreamedSFTTrainer, SFTTrainer))
    found, expected = (trainer.state.log_history[0] for trainer in (ours, theirs))
    assert found.keys() == expected.keys() and "num_tokens" in found
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    for mine, stock in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-6)
    found, expected = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert patch_state(ours.model).materialized == 0 and patch_state(ours.model).streamed > 0


@pytest.mark.parametrize(
    ("options", "loss"),
    [*((o, None) for o in OPTIONS[:5]), *((o, loss) for o in OPTIONS[2:5:2] for loss in ("emo", "focal:gamma=2"))],
    ids=str,
)
def test_weights_come_through_packing_and_truncation(tmp_path, options, loss):
    rows = texts(loss_weight=ROWS)
    trainer = fit(tmp_path, rows, loss=loss, **options)
    batch = batch_of(trainer)
    expected, parameters = step_of_dense(batch, loss)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    for found, stepped in zip(trainer.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(found, stepped, rtol=1e-4, atol=1e-6)
    kept = set(batch["token_weights"][batch["labels"] != -100].tolist())
    assert kept == {1.0, 2.0, 0.5}, "rows of weight 0 are masked"


def test_weights_of_tokens_stay_with_them(tmp_path):
    """Each token id has its own weight, so it can be found again wherever TRL puts the token."""
    ids = [tokenizer()(text)["input_ids"] for text in TEXTS]
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": ids,
            "token_weights": [[float(i) / 8 for i in row] for row in ids],
            "loss_weight": [0.5] * len(ids),
        }
    )
    for options in ({"max_length": 3}, {"max_length": 3, "truncation_mode": "keep_end"}, *OPTIONS[1:5]):
        batch = batch_of(trainer_of(tmp_path, rows, **options))
        valid = batch["labels"] != -100
        assert valid.sum() > 8
        torch.testing.assert_close(batch["token_weights"][valid], batch["labels"][valid] / 16)
        assert not batch["token_weights"][:, 1:][~valid[:, 1:] & (batch["input_ids"][:, 1:] == 0)].any()


def test_accumulation_does_not_change_a_step(tmp_path):
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        weights = [1e-2 * w + 1e-3 for w in ROWS]  # they add up to less than 1
        found.append(logged(fit(tmp_path, texts(loss_weight=weights), loss="emo", **sizes)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def labels_of(batch, weight):
    """The labels of the first row that have this weight."""
    chosen = (batch["token_weights"][0] == weight) & (batch["labels"][0] != -100)
    return batch["labels"][0][chosen].tolist()


def ids_of(text):
    return tokenizer()(text)["input_ids"]


def test_weights_of_turns(tmp_path):
    batch = batch_of(trainer_of(tmp_path, chats(), max_length=None, shuffle_dataset=False))
    assert labels_of(batch, 1.0) == ids_of(f"<s>dog{TEXTS[0]}</s><s>dog{TEXTS[2]}</s>")
    assert labels_of(batch, 1.5) == ids_of(f"<s>fox<s>{TEXTS[3]}</s>")
    assert labels_of(batch, 0.0) == [], "masked"
    only = batch_of(trainer_of(tmp_path, chats(), max_length=None, assistant_only_loss=True))
    assert labels_of(only, 1.5) == ids_of(f"{TEXTS[3]}</s>") == [i for i in only["labels"][0].tolist() if i != -100]
    parts = batch_of(trainer_of(tmp_path, chats(parts=True), max_length=None))
    assert labels_of(parts, 1.5) == ids_of(f"{TEXTS[3]}</s>"), "the loss of the completion alone"
    packed = fit(tmp_path, chats(), packing=True, max_length=64)
    expected, _ = step_of_dense(batch_of(packed))
    assert packed.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    later = chats().select([0]).to_list()
    later[0]["messages"][3]["weight"] = None
    rows = datasets.Dataset.from_list([*later, *chats().to_list()])
    assert 1.5 in batch_of(trainer_of(tmp_path, rows, max_length=None))["token_weights"], "not in the first row"


def test_templates_that_change_earlier_turns():
    """Qwen3's drops the reasoning of earlier answers, and its marks."""
    found = tiny_tokenizer()
    found.chat_template = (
        "{% for m in messages %}<s>{{ m.role }} {% if m.role == 'assistant' and loop.last %}think over "
        "{% endif %}{{ m.content.split('</think>')[-1].strip() }}</s> {% endfor %}"
    )
    turns = [
        {"role": "user", "content": "the fox", "weight": 0},
        {"role": "assistant", "content": "quick</think> brown ", "weight": 2.0},
        {"role": "user", "content": "jumps", "weight": 3},
        {"role": "assistant", "content": "lazy", "weight": None},
    ]
    columns = chat_tokens(found, turns)
    for weight, text in {
        0: "<s>user the fox</s> ",
        2.0: "<s>assistant brown</s> ",
        3: "<s>user jumps</s> ",
        1.0: "<s>assistant think over lazy</s> ",
    }.items():
        ids = [i for i, w in zip(columns["input_ids"], columns["token_weights"], strict=True) if w == weight]
        assert ids == found(text)["input_ids"]
    found.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match=r"^messages have weights, but the chat template renders turn 1 in another way"
    ):
        chat_tokens(found, turns)


def mean_logp(found):
    return {"mean": float(found.predictions.logp.mean())}


def test_no_logits_are_made(tmp_path):
    model = tiny(std=0.05, vocab_size=8 * V)
    trainer = trainer_of(
        tmp_path, texts(loss_weight=ROWS), model=model, memory_budget=1 << 12, max_length=None, eval_top_k=3,
        eval_calibration=True, streamed_metrics=True, compute_metrics=mean_logp,
    )  # fmt: skip
    batch = batch_of(trainer)
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        found = trainer.evaluate()
    assert largest.numel <= max(p.numel() for p in model.parameters()) < batch["labels"].numel() * 8 * V
    assert {"eval_mean", "eval_top3_accuracy", "eval_calibration_error"} <= found.keys()


def test_streamed_metrics_are_those_of_dense_logits(tmp_path):
    seen = []
    trainer = trainer_of(
        tmp_path, texts(), streamed_metrics=True, streamed_entropy=True, per_device_eval_batch_size=3,
        compute_metrics=lambda p: seen.append(p) or {},
    )  # fmt: skip
    trainer.evaluate()
    (metrics, labels), model = (seen[0].predictions, torch.as_tensor(seen[0].label_ids)), tiny(std=0.05)
    for i, row in enumerate(trainer.eval_dataset):
        ids = torch.tensor([row["input_ids"]])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        assert labels[i, : ids.shape[1]].tolist() == row["labels"]
        target = ids[0, 1:]
        part = slice(1, ids.shape[1])
        assert metrics.top[i, part].tolist() == logp.argmax(-1).tolist()
        torch.testing.assert_close(torch.as_tensor(metrics.logp[i, part]), logp.gather(-1, target[:, None])[:, 0])
        torch.testing.assert_close(torch.as_tensor(metrics.entropy[i, part]), -(logp.exp() * logp).sum(-1))
        assert (metrics.top[i, ids.shape[1] :] == -100).all() and metrics.top[i, 0] == -100


def test_adapters_and_prompt_tuning(tmp_path):
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

    for config in (
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    ):
        torch.manual_seed(0)
        model = get_peft_model(tiny(std=0.05), config)
        state = {name: x.clone() for name, x in model.state_dict().items()}
        trainer = fit(tmp_path, texts(loss_weight=ROWS), model=model, loss="focal:gamma=1")
        batch = batch_of(trainer)
        model.load_state_dict(state)
        with torch.no_grad(), hf_xent.patching.unpatched(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        first = 0 if logits.shape[1] > batch["labels"].shape[1] else 1  # the last virtual token predicts label 0
        labels, weights = batch["labels"][:, first:], batch["token_weights"][:, first:]
        weights = weights * (labels != -100)
        logp = logits[:, -labels.shape[1] - 1 : -1].log_softmax(-1)
        logp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        expected = ((1 - logp.exp()) * -logp * weights).sum() / weights.sum()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_auxiliary_losses_stay(tmp_path):
    found = [
        fit(tmp_path, texts(), kind, model=tiny("mixtral aux loss", std=0.05)).state.log_history[0]
        for kind in (StreamedSFTTrainer, SFTTrainer)
    ]
    assert found[0].keys() == found[1].keys() and "aux_loss" in found[0]
    for name, value in found[1].items():
        assert found[0][name] == pytest.approx(value, rel=1e-5), name


def test_a_step_without_labels_changes_nothing(tmp_path):
    ids = tokenizer()(TEXTS[0])["input_ids"]
    columns = {"input_ids": [ids] * 8, "labels": [[-100] * len(ids)] * 8}
    for more in ({}, {"token_weights": [[1.0] * len(ids)] * 8}):
        rows = datasets.Dataset.from_dict({**columns, **more})
        trainer = fit(tmp_path, rows, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, loss="emo")
        assert trainer.state.log_history[0]["loss"] == 0
        for found, expected in zip(trainer.model.parameters(), tiny(std=0.05).parameters(), strict=True):
            assert torch.equal(found, expected)


def test_a_compiled_model_trains_as_it_does_without(tmp_path):
    found = []
    for options in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}):
        trainer = fit(tmp_path, texts(), loss="focal", max_steps=2, **options)
        found.append([(x["loss"], x["entropy"]) for x in trainer.state.log_history if "loss" in x])
        torch.compiler.reset()
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, "loss_type is 'dft', but the loss is chosen by loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but TRL would compute logits for it"),
        ({"loss": "forward_kl"}, r"loss is ForwardKL\(.*: it compares with a teacher"),
        ({"streamed_entropy": True}, "streamed_entropy is True, but streamed_metrics is False"),
        ({"eval_top_k": 0}, "eval_top_k is 0"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer_of(tmp_path, texts(), **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"loss_weight": [1.0] * 7 + [-2.0]}, "loss_weight has -2.0: give finite numbers >= 0"),
        ({"token_weights": [[1.0]] * 8}, "the data has a column token_weights but no input_ids"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, texts(**columns))
    with pytest.raises(ValueError, match=r"token_weights has 1 numbers, but the row has 2 labels"):
        trainer_of(tmp_path, datasets.Dataset.from_list([{"input_ids": [3, 4], "token_weights": [1.0]}]))
