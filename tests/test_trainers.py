"""XentTrainer: what transformers' Trainer computes, under accumulation, resume and evaluation, without logits."""

import copy
import inspect
import pickle
import warnings
from dataclasses import dataclass

import datasets
import pytest
import torch
import transformers
import trl
from packaging import version
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    HfArgumentParser,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_xent
from hf_xent import trainers
from hf_xent.losses import CrossEntropy, Focal
from hf_xent.patching import patch_state
from hf_xent.trainers import (
    EMOConfig,
    EMOTrainer,
    LNRemovalConfig,
    LNRemovalTrainer,
    NoiseFiTTrainer,
    XentConfig,
    XentTrainer,
)
from support.models import V, gradients, tiny

STEPS = 4


@pytest.fixture(scope="module")
def rows():
    """Sequences of unequal lengths, some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(32):
        length = int(torch.randint(3, 20, (1,), generator=generator))
        ids = torch.randint(3, V, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return datasets.Dataset.from_list(found)


def collate(examples):
    length = max(len(x["input_ids"]) for x in examples)
    padded = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([x[k] + [fill] * (length - len(x[k])) for x in examples]) for k, fill in padded.items()}


def arguments(folder, kind=XentConfig, **options):
    common = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(**{**common, **options})


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fit(folder, rows, kind=XentTrainer, resume=None, layers=2, **options):
    more = ("loss", "compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "callbacks")
    extra = {k: options.pop(k) for k in more if k in options}
    config = arguments(folder, XentConfig if kind is XentTrainer else TrainingArguments, **options)
    model = tiny(std=0.05, num_hidden_layers=layers)
    trainer = kind(model, config, train_dataset=rows, eval_dataset=rows, data_collator=collate, **extra)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_equals_the_stock_trainer_step_by_step(tmp_path, rows):
    ours, stock = fit(tmp_path, rows), fit(tmp_path, rows, kind=Trainer)
    torch.testing.assert_close(losses_of(ours), losses_of(stock), rtol=1e-5, atol=0)
    for (name, mine), theirs in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert patch_state(ours.model).materialized == 0


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "focal", "emo", CrossEntropy(z_loss=1e-2, label_smoothing=0.1)], ids=str
)
def test_accumulation_does_not_change_gradients(tmp_path, rows, loss):
    """1 x 8, 2 x 4 and 8 x 1 sequences of unequal lengths are the same step."""
    found = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = fit(tmp_path, rows, loss=loss, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **sizes)
        entry = trainer.state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"], entry["perplexity"]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("kind", ["bart", "t5", "bert"])
def test_accumulation_of_models_that_do_not_read_the_number_of_items(tmp_path, kind, loss):
    """The stock trainer adds up the means of their batches; labels are of 1 to 8 tokens, so those means differ."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    make = {
        "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=V, d_model=16, **heads, **layers)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
                     decoder_start_token_id=0)
        ),
        "bert": lambda: BertForMaskedLM(
            BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                       **none)
        ),
    }[kind]  # fmt: skip
    ids = torch.randint(3, V, (8, 10), generator=torch.Generator().manual_seed(1))
    texts = [
        {"input_ids": row.tolist(), "labels": [-100] * (i + 2) + row[i + 2 :].tolist()} for i, row in enumerate(ids)
    ]
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        config = arguments(tmp_path, XentConfig, **sizes, max_steps=1, learning_rate=0.0, max_grad_norm=0.0)
        trainer = XentTrainer(make(), config, loss=loss, train_dataset=texts)
        trainer.train()
        entry = trainer.state.log_history[0]
        found.append((entry["loss"], entry["grad_norm"], entry["perplexity"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "emo"])
def test_resumed_losses_are_bit_equal(tmp_path, rows, loss):
    straight = fit(tmp_path, rows, loss=loss, save_strategy="steps", save_steps=2)
    resumed = fit(tmp_path, rows, loss=loss, save_strategy="steps", save_steps=2, resume=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(straight)


def test_logs_what_the_softmax_knew(tmp_path, rows):
    trainer = fit(tmp_path, rows, max_steps=1, learning_rate=0.0)
    entry = trainer.state.log_history[0]
    assert entry["perplexity"] == pytest.approx(torch.tensor(entry["loss"]).exp().item(), rel=1e-5)
    metrics = trainer.evaluate()
    logits, labels, model = [], [], trainer.model
    for example in rows:
        batch = collate([example])
        logits.append(model(batch["input_ids"]).logits[0, :-1])
        labels.append(batch["labels"][0, 1:])
    logits, labels = torch.cat(logits).detach(), torch.cat(labels)
    logits, labels = logits[labels != -100], labels[labels != -100]
    logp = logits.log_softmax(-1)
    assert metrics["eval_entropy"] == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    nll = -logp.gather(-1, labels[:, None]).mean()
    assert metrics["eval_perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert patch_state(model).materialized == 0


def test_training_and_evaluation_sums_do_not_mix(tmp_path, rows):
    trainer = fit(tmp_path, rows, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1)
    [train] = [entry for entry in trainer.state.log_history if "loss" in entry]
    alone = fit(tmp_path, rows, max_steps=2, logging_steps=2)
    assert train["perplexity"] == next(entry for entry in alone.state.log_history if "loss" in entry)["perplexity"]


def test_compute_metrics_still_sees_logits(tmp_path, rows):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"vocabulary": prediction.predictions.shape[-1]}

    trainer = fit(tmp_path, rows, max_steps=1, compute_metrics=metrics)
    assert trainer.evaluate()["eval_vocabulary"] == V and seen["shape"][0] == len(rows)
    assert patch_state(trainer.model).materialized > 0
    top = fit(
        tmp_path,
        rows,
        max_steps=1,
        compute_metrics=lambda p: {"columns": p.predictions.ndim},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert top.evaluate()["eval_columns"] == 2
    assert patch_state(top.model).materialized == 0, "an arg max is streamed"


def test_label_smoothing_factor_is_streamed(tmp_path, rows):
    ours = fit(tmp_path, rows, label_smoothing_factor=0.1)
    stock = fit(tmp_path, rows, kind=Trainer, label_smoothing_factor=0.1)
    torch.testing.assert_close(losses_of(ours), losses_of(stock), rtol=1e-4, atol=0)
    assert ours.objective == CrossEntropy(label_smoothing=0.1) and patch_state(ours.model).materialized == 0


def test_loss_by_name_options_and_object(tmp_path, rows):
    named = fit(tmp_path, rows, loss="focal:gamma=1.0")
    configured = XentTrainer(tiny(), arguments(tmp_path, loss="focal:gamma=1.0"), train_dataset=rows)
    given = fit(tmp_path, rows, loss=Focal(gamma=1.0))
    assert named.objective == configured.objective == given.objective == Focal(gamma=1.0)
    assert losses_of(named) == losses_of(given)
    with pytest.raises(ValueError, match="smooths cross-entropy only"):
        fit(tmp_path, rows, loss="focal", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss is 'nonesuch'"):
        fit(tmp_path, rows, loss="nonesuch")


def test_a_batch_without_labels_does_not_stop_training(tmp_path, rows):
    silent = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    mixed = datasets.concatenate_datasets([silent.select(range(8)), rows.select(range(8))])
    trainer = XentTrainer(
        tiny(std=0.05),
        arguments(tmp_path, train_sampling_strategy="sequential", max_steps=2),
        train_dataset=mixed,
        data_collator=collate,
    )
    trainer.train()
    assert losses_of(trainer)[0] == 0.0 and losses_of(trainer)[1] > 0
    assert not gradients(trainer.model)


def test_bfloat16_and_saved_model(tmp_path, rows):
    config = arguments(tmp_path, max_steps=2)
    trainer = XentTrainer(tiny(std=0.05, dtype=torch.bfloat16), config, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    reloaded = type(trainer.model).from_pretrained(tmp_path / "model")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def test_tail_reaches_the_model(tmp_path, rows):
    trainer = fit(tmp_path / "tail", rows, tail=0.2)
    assert patch_state(trainer.model).tail == 0.2
    assert losses_of(trainer) == pytest.approx(losses_of(fit(tmp_path / "exact", rows)), rel=0.05)


def dense_perplexity(model, rows):
    """Of unpatched logits, over all tokens with a label."""
    nll, tokens = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits.detach()[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        nll += F.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return torch.tensor(nll / tokens).exp().item()


class Looks(TrainerCallback):
    """Forward passes with labels that are no steps of the trainer's, in both modes."""

    def on_step_end(self, args, state, control, model, **kwargs):
        ids = torch.full((1, 9), 5)
        for training in (True, False):
            model.train(training)(input_ids=ids, labels=ids)

    on_prediction_step = on_step_end


def test_every_evaluation_has_its_own_names_and_numbers(tmp_path, rows):
    sets = {"a": rows.select(range(8)), "b": rows.select(range(8, 20))}
    trainer = fit(tmp_path, rows, max_steps=1, callbacks=[Looks()])
    expected = {name: dense_perplexity(trainer.model, part) for name, part in sets.items()}
    found = trainer.evaluate(sets)
    assert {k for k in found if k.endswith("perplexity")} == {"eval_a_perplexity", "eval_b_perplexity"}
    assert {k for k in found if k.endswith("accuracy")} == {"eval_a_mean_token_accuracy", "eval_b_mean_token_accuracy"}
    assert found["eval_a_perplexity"] == pytest.approx(expected["a"], rel=1e-5)
    assert found["eval_b_perplexity"] == pytest.approx(expected["b"], rel=1e-5)
    predicted = trainer.predict(sets["b"]).metrics
    assert predicted["test_perplexity"] == pytest.approx(expected["b"], rel=1e-5)
    again = trainer.evaluate(sets["a"], metric_key_prefix="late")
    assert again["late_perplexity"] == pytest.approx(expected["a"], rel=1e-5) and "eval_perplexity" not in again
    logged = [entry for entry in trainer.state.log_history if "late_loss" in entry]
    assert logged[0]["late_perplexity"] == again["late_perplexity"], "in the log, too"


def test_forward_passes_of_callbacks_are_not_counted(tmp_path, rows):
    looked = fit(tmp_path, rows, max_steps=3, logging_steps=3, callbacks=[Looks()]).state.log_history[0]
    alone = fit(tmp_path, rows, max_steps=3, logging_steps=3).state.log_history[0]
    for name in ("perplexity", "entropy", "mean_token_accuracy"):
        assert looked[name] == alone[name]


def test_a_metric_of_the_users_goes_before_ours(tmp_path, rows):
    trainer = fit(tmp_path, rows, max_steps=1, compute_metrics=lambda p: {"perplexity": -1.0})
    assert trainer.evaluate()["eval_perplexity"] == -1.0


def test_no_tokens_have_no_perplexity_and_one_warning(tmp_path, rows):
    silent = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.warns(UserWarning, match="no token has a label since the last log") as seen:
        trainer = fit(tmp_path, silent, max_steps=4)
        metrics = trainer.evaluate()
    assert len(seen) == 1
    assert not any("perplexity" in k or "entropy" in k for e in (*trainer.state.log_history, metrics) for k in e)
    assert losses_of(trainer) == [0.0] * 4


def test_a_loss_that_is_computed_elsewhere_is_said(tmp_path, rows):
    model = tiny(std=0.05)
    model.lm_head.weight.ds_id = 0  # ZeRO-3's mark of weights that are there during their layer's call only
    model.lm_head.register_forward_hook(lambda layer, args, logits: None)  # which needs the logits in that call
    trainer = XentTrainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collate)
    with pytest.warns(UserWarning, match="weight is freed after its call, and it has a hook") as seen:
        trainer.train()
    assert sum("perplexity" in str(warning.message) for warning in seen) == 1
    assert losses_of(trainer) == pytest.approx(losses_of(fit(tmp_path, rows, kind=Trainer)), rel=1e-5)


def smoothed(outputs, labels, num_items_in_batch=None):
    """A user's loss."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.3) / num_items_in_batch


def test_a_loss_of_the_users_gets_lazy_logits(tmp_path, rows):
    ours = fit(tmp_path, rows, compute_loss_func=smoothed)
    stock = fit(tmp_path, rows, kind=Trainer, compute_loss_func=smoothed)
    torch.testing.assert_close(losses_of(ours), losses_of(stock), rtol=1e-5, atol=0)
    assert patch_state(ours.model).materialized == 0
    expected = dense_perplexity(ours.model, rows)
    assert ours.evaluate()["eval_perplexity"] == pytest.approx(expected, rel=1e-5), "of the labels, without smoothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "focal", "compute_loss_func": smoothed}, "compute_loss_func is given and loss is Focal"),
        ({"loss": "cross_entropy", "compute_loss_func": smoothed}, "compute_loss_func is given and loss is Cross"),
        ({"label_smoothing_factor": 0.1, "compute_loss_func": smoothed}, r"CrossEntropy\(label_smoothing=0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True"),
    ],
)
def test_refusals(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, rows, **options)


def test_a_model_is_given_and_not_made_later(tmp_path, rows):
    with pytest.raises(ValueError, match="model_init is given, but the model is patched once"):
        XentTrainer(None, arguments(tmp_path), train_dataset=rows, model_init=tiny)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracer reads it
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {"label_smoothing_factor": 0.1, "eval_top_k": 3, "eval_calibration": True}),
        ("eager", {"loss": "focal"}),
    ],
)
def test_a_compiled_model_trains_as_it_does_without(tmp_path, rows, backend, options):
    options = options | {"max_steps": 2, "layers": 1}
    compiled = fit(tmp_path, rows, torch_compile=True, torch_compile_backend=backend, **options)
    plain = fit(tmp_path, rows, **options)
    torch.testing.assert_close(losses_of(compiled), losses_of(plain), rtol=1e-5, atol=0)
    logs = [[entry for entry in x.state.log_history if "entropy" in entry][-1] for x in (compiled, plain)]
    for name in ("perplexity", "entropy", "mean_token_accuracy"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4)
    evaluated, expected = (
        {k: v for k, v in x.evaluate().items() if "second" not in k and "time" not in k} for x in (compiled, plain)
    )
    assert evaluated == pytest.approx(expected, rel=1e-4, abs=1e-6)
    state = patch_state(compiled.model)
    assert (state.materialized, state.bypassed) == (0, 0) and state.streamed > 0
    torch.compiler.reset()


KINDS = sorted(
    name.removesuffix("Trainer") for names in trainers.METHODS.values() for name in names if name.endswith("Trainer")
)


@pytest.mark.parametrize("name", KINDS)
def test_the_configuration_of_another_trainer_is_refused(name, tmp_path, rows):
    """transformers' own, TRL's, a parent's, a child's, and what is none; before anything is done to the model."""
    kind, model = getattr(trainers, f"{name}Trainer"), tiny()
    preference = name in ("SPO", "SPCE", "OSP")
    others = [TrainingArguments, trl.DPOConfig, LNRemovalConfig if name != "LNRemoval" else EMOConfig]
    others += [hf_xent.SPCEConfig] if name == "OSP" else [hf_xent.OSPConfig] if preference else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, of an old name
        configs = [config(output_dir=str(tmp_path), use_cpu=True, bf16=False) for config in others]
    for config in [*configs, {"output_dir": "out"}]:
        with pytest.raises(
            ValueError, match=rf"args is a {type(config).__name__}: {name}Trainer takes a .*{name}Config"
        ):
            kind(model, args=config, train_dataset=rows)
    with pytest.raises(ValueError, match="is not patched"):
        patch_state(model)


@dataclass
class LongRun(XentConfig):
    num_train_epochs: float = 30.0


def test_a_configuration_made_from_the_trainers_own_is_taken(tmp_path, rows):
    assert XentTrainer(tiny(), arguments(tmp_path, LongRun), train_dataset=rows).args.num_train_epochs == 30


@pytest.mark.parametrize("name", KINDS)
def test_label_smoothing_is_honored_or_refused(name, tmp_path, rows):
    kind, config = getattr(trainers, f"{name}Trainer"), getattr(trainers, f"{name}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, label_smoothing_factor=0.1)
    if name in ("Xent", "LNRemoval"):
        assert kind(tiny(), args, train_dataset=rows).objective == CrossEntropy(label_smoothing=0.1)
        return
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1"):
        kind(tiny(), args=args, train_dataset=rows)


def configured(name, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, of an old name
        config = getattr(trainers, f"{name}Config")
        return config(output_dir=str(folder), use_cpu=True, **{"bf16": False, **options})


@pytest.mark.parametrize("name", KINDS)
def test_options_hold_what_they_declare(name, tmp_path):
    """Numbers are neither text nor flags nor nan, whole ones are whole, flags are flags, text is text."""
    kinds = [
        kind for kind in getattr(trainers, f"{name}Config").__mro__ if kind.__module__.startswith("hf_xent.trainers")
    ]
    declared = {key: x.split(" | ") for kind in kinds for key, x in inspect.get_annotations(kind).items()}
    wrong = {"float": ("0.1", True, float("nan")), "int": ("3", True, 2.5), "bool": (1, "yes"), "str": (5, ["a"])}
    asked = 0
    if name == "SelfDistilQA":
        del declared["weight"]  # text or a number
    for key, (kind, *none) in declared.items():
        for value in (*wrong.get(kind, ()), *(() if none or kind not in wrong else (None,))):
            with pytest.raises(ValueError, match=rf"^{key} is "):
                configured(name, tmp_path, **{key: value})
            asked += 1
    assert asked > 2 or name == "SPCE"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Xent", {"memory_budget": 0}), ("Xent", {"tail": 1.0}), ("EMO", {"ratio_clamp": 0.0}),
        ("NoiseFiT", {"noise_std": float("inf")}), ("NoiseFiT", {"consistency_weight": -0.1}),
        ("NoiseFiT", {"temperature": float("inf")}), ("NoiseFiT", {"num_noise_layers": 0}),
        ("NoiseFiT", {"rdrop_weight": -1.0, "method": "rdrop"}), ("F2C", {"cce_weight": -0.1}),
        ("F2C", {"agreement_weight": float("inf")}), ("F2C", {"top_k": 1}), ("F2C", {"alignment_max": float("inf")}),
        ("DXO", {"sampling_rate": 1.0}), ("DXO", {"warm_start": float("inf")}), ("DXO", {"warm_start": 1.5}),
        ("DXO", {"dxo_learning_rate": 0.0, "warm_start": 1}), ("DXO", {"max_fpr": 0.0}), ("DXO", {"min_tpr": 1.0}),
        ("LNRemoval", {"removal_end": 1.0}), ("LNRemoval", {"removal_start": -0.1}),
        ("LNRemoval", {"sigma_momentum": 1.1}), ("SPCE", {"label_smoothing": "0.1"}), ("SPCE", {"beta": -0.1}),
        ("SPO", {"degrees": 1}), ("SPO", {"max_removed": 1.1}), ("SPO", {"gamma_w": float("nan")}),
        ("OSP", {"temperature": 0.0}), ("OSP", {"strength_eps": 0.5}), ("OSP", {"max_new_tokens": 0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, options, tmp_path):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"^{key} is {value!r}: choose "):
        configured(name, tmp_path, **options)


@pytest.mark.parametrize("name", KINDS)
def test_configurations_come_back_from_their_text(name, tmp_path):
    config = configured(name, tmp_path)
    (tmp_path / "config.json").write_text(config.to_json_string())
    parser, given = HfArgumentParser(type(config)), ["--output_dir", str(tmp_path), "--bf16", "False", "--use_cpu", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's
        [again] = parser.parse_json_file(str(tmp_path / "config.json"), allow_extra_keys=True)
        [parsed] = parser.parse_args_into_dataclasses(given)
    for other in (again, parsed, pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        kinds = [kind for kind in type(config).__mro__ if kind.__module__.startswith("hf_xent.trainers")]
        own = {key for kind in kinds for key in inspect.get_annotations(kind)} & {*vars(config)}
        assert [getattr(other, key) for key in own] == [getattr(config, key) for key in own]


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    assert repr(configured("Xent", tmp_path, memory_budget=1e6).memory_budget) == "1000000"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda rows: datasets.DatasetDict(train=rows), "train_dataset is a DatasetDict: .* one split"),
        (lambda rows: rows.to_pandas(), "train_dataset is a DataFrame: .*Dataset.from_pandas"),
        (lambda rows: rows.to_dict(), "train_dataset is a dict: .*from_dict"),
        (lambda rows: "rows.jsonl", "train_dataset is a str"),
        (lambda rows: rows.select([]), "train_dataset has no rows"),
        (lambda rows: [], "train_dataset has no rows"),
        (
            lambda rows: [*rows, {"input_ids": None, "labels": [5]}],
            "train_dataset has None in column input_ids, row 32",
        ),
        (
            lambda rows: datasets.Dataset.from_list([{"input_ids": [5]}, {"input_ids": None}]),
            "train_dataset has None in column input_ids, row 1",
        ),
        (lambda rows: [{"input_ids": "the cat", "labels": [5]}], "has a str in column input_ids: give token ids"),
        (lambda rows: [{"input_ids": [5], "labels": 1}], "has a int in column labels: give token ids"),
    ],
)
def test_what_is_no_data_set_is_refused_by_name(tmp_path, rows, data, message):
    with pytest.raises(ValueError, match=message):
        XentTrainer(tiny(), arguments(tmp_path), train_dataset=data(rows))
    with pytest.raises(ValueError, match=message.replace("train_dataset", "b")):
        XentTrainer(tiny(), arguments(tmp_path), eval_dataset={"a": rows, "b": data(rows)})


def test_a_collator_of_the_users_may_take_any_value(tmp_path, rows):
    read = lambda found: collate([{"input_ids": [5, 6], "labels": [5, 6]} for _ in found])  # noqa: E731
    words = [{"input_ids": "the cat", "labels": None}] * 4
    options = {"per_device_train_batch_size": 2, "remove_unused_columns": False}
    trainer = XentTrainer(tiny(), arguments(tmp_path, **options), train_dataset=words, data_collator=read)
    trainer.train()
    assert len(losses_of(trainer)) == STEPS


def test_evaluation_sets_that_are_none_are_refused_by_name(tmp_path, rows):
    sets = {"a": rows, "b": rows}
    trainer = XentTrainer(tiny(), arguments(tmp_path), eval_dataset=sets, data_collator=collate)
    assert "eval_perplexity" in trainer.evaluate("a")
    with pytest.raises(ValueError, match=r"eval_dataset is 'c': .*\(a, b\)"):
        trainer.evaluate("c")
    with pytest.raises(ValueError, match="test_dataset is a str"):
        trainer.predict("rows.jsonl")


@pytest.mark.parametrize("kind", [XentTrainer, EMOTrainer, LNRemovalTrainer])
def test_batches_without_labels_are_no_part_of_an_evaluation(tmp_path, rows, kind):
    """Zeros would halve its loss, and make that of no labels the best there is."""
    masked = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
    parts = {"rows": rows, "masked": masked, "both": datasets.concatenate_datasets([masked, rows])}
    args = arguments(tmp_path, kind.config_class, per_device_eval_batch_size=8)
    trainer = kind(tiny(), args, eval_dataset=parts, data_collator=collate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no labels
        found = trainer.evaluate()
    assert torch.tensor(found["eval_masked_loss"]).isnan()
    assert trainer.args.logging_nan_inf_filter
    assert found["eval_both_perplexity"] == pytest.approx(found["eval_rows_perplexity"])
    if version.parse(transformers.__version__) >= version.parse("5.20"):  # leaves what is not finite out of the mean
        assert found["eval_both_loss"] == pytest.approx(found["eval_rows_loss"])


@pytest.mark.parametrize("kind", [XentTrainer, EMOTrainer, NoiseFiTTrainer, LNRemovalTrainer])
def test_training_without_labels_is_refused(tmp_path, rows, kind):
    layers = {"num_noise_layers": 1} if kind is NoiseFiTTrainer else {}
    args = arguments(tmp_path, kind.config_class, **layers)
    trainer = kind(tiny(), args, train_dataset=[{"input_ids": [5, 6]}] * 8)
    with pytest.raises(ValueError, match="a batch has input_ids but no labels"):
        trainer.train()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_language_model_is_refused_by_name(name, tmp_path, rows):
    kind, text = getattr(trainers, f"{name}Trainer"), name in ("SPO", "SPCE", "OSP", "StreamedSFT", "Distillation")
    for model in (None, torch.nn.Linear(2, 2), *(() if text else ("some/model",))):
        said = "model is a Linear" if isinstance(model, torch.nn.Module) else f"model is {model!r}: load it first"
        with pytest.raises(ValueError, match=said):
            kind(model, args=configured(name, tmp_path), train_dataset=rows)


@pytest.mark.parametrize("name", ["NoiseFiT", "F2C", "SPO", "SPCE", "OSP", "LNRemoval", "StreamedSFT"])
def test_encoder_decoders_are_refused_where_inputs_and_labels_are_one_sequence(name, tmp_path, rows):
    config = transformers.T5Config(vocab_size=V, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match=r"model is a T5ForConditionalGeneration, an encoder and a decoder.*XentTrainer"
    ):
        getattr(trainers, f"{name}Trainer")(model, args=configured(name, tmp_path), train_dataset=rows)
