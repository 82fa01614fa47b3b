"""Evaluation without logits: what XentTrainer reports equals what the stock Trainer's dense logits say."""

import math
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_xent.metrics.calibration import binned, calibration_error
from hf_xent.trainers import NoiseFiTConfig, NoiseFiTTrainer, XentConfig, XentTrainer
from hf_xent.trainers.evaluation import StreamedMetrics
from support.models import SETTINGS, V, tiny, tiny_tokenizer
from support.oracle import Largest
from support.ranks import run_ranks

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "dog", "the fox jumps", "lazy brown dog the fox"]


@pytest.fixture(scope="module")
def rows():
    """Five rows of unequal lengths, the first label of each masked, and one whole turn."""
    tokenizer, found = tiny_tokenizer(), []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"] + [2]
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    found[1]["labels"][1:4] = [-100] * 3
    return datasets.Dataset.from_list(found)


def collate(examples):
    length = max(len(x["input_ids"]) for x in examples)
    fills = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([x[k] + [fill] * (length - len(x[k])) for x in examples]) for k, fill in fills.items()}


def trainer_of(folder, rows, kind=XentTrainer, model=None, **options):
    common = {"per_device_eval_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    more = ("compute_metrics", "preprocess_logits_for_metrics", "processing_class", "compute_loss_func", "loss")
    extra = {k: options.pop(k) for k in more if k in options}
    configs = {XentTrainer: XentConfig, Trainer: TrainingArguments, NoiseFiTTrainer: NoiseFiTConfig}
    config = configs[kind](output_dir=str(folder), **{**common, **options})
    model = tiny() if model is None else model
    return kind(model, config, eval_dataset=rows, data_collator=collate, **extra)


def dense(folder, rows, model=None, **options):
    """Log-probabilities [tokens, V], labels [tokens] and where they are in [N, T], by the stock trainer's logits."""
    output = trainer_of(folder, rows, Trainer, model, **options).predict(rows)
    logits, labels = torch.as_tensor(output.predictions)[:, :-1], torch.as_tensor(output.label_ids)[:, 1:]
    mask = labels != -100
    return logits[mask].double().log_softmax(-1), labels[mask], mask


@pytest.mark.parametrize("name", ["llama", "gpt2", *SETTINGS, "bert bias"])
def test_measures_are_those_of_dense_logits(tmp_path, rows, name):
    logp, labels, mask = dense(tmp_path, rows, tiny(name))
    found = trainer_of(
        tmp_path, rows, model=tiny(name), eval_top_k=5, eval_calibration=True, eval_bits_per_byte=True,
        processing_class=tiny_tokenizer(),
    ).evaluate()  # fmt: skip
    target = logp.gather(-1, labels[:, None])[:, 0]
    confidence, top = logp.exp().max(-1)
    assert found["eval_perplexity"] == pytest.approx(float((-target).mean().exp()), rel=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx(float((top == labels).double().mean()))
    assert found["eval_entropy"] == pytest.approx(float(-(logp.exp() * logp).sum(-1).mean()), rel=1e-5)
    assert found["eval_top5_accuracy"] == pytest.approx(
        float((logp.topk(5, -1).indices == labels[:, None]).any(-1).double().mean())
    )
    error = calibration_error(binned(confidence, top == labels))
    assert found["eval_calibration_error"] == pytest.approx(error, abs=1e-6)
    kept = [text.encode() for text in TEXTS]
    lengths = [len(tiny_tokenizer().decode(ids[ids != -100], skip_special_tokens=True)) for ids in _targets(rows)]
    assert sum(lengths) < sum(map(len, kept)), "masked and unpredicted text has no bytes"
    assert found["eval_bits_per_byte"] == pytest.approx(float(-target.sum()) / math.log(2) / sum(lengths), rel=1e-5)
    assert mask.sum() == len(labels)


def _targets(rows):
    return [torch.tensor(row["labels"][1:]) for row in rows]


def test_bits_per_byte_are_those_of_text_in_utf8(tmp_path):
    """A model of the uniform distribution over V tokens takes log2 V bits per token, whatever its bytes."""
    tokenizer = tiny_tokenizer("äöü €uro " * 30)
    ids = tokenizer("€uro äöü")["input_ids"]
    data = datasets.Dataset.from_list([{"input_ids": [1, *ids], "labels": [-100, *ids]}])
    trainer = trainer_of(tmp_path, data, model=tiny(std=0.0), eval_bits_per_byte=True, processing_class=tokenizer)
    found = trainer.evaluate()["eval_bits_per_byte"]
    assert found == pytest.approx(len(ids) * math.log2(V) / len(" €uro äöü".encode()), rel=1e-5)


VARIANTS = [
    {},
    {"eval_accumulation_steps": 1},
    {"per_device_eval_batch_size": 5},
    {"loss": "focal"},
    {"loss": "emo"},
    {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.logsumexp(-1).mean()},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: next(iter(options), "plain"))
def test_compute_metrics_gets_what_logits_would_have_told(tmp_path, rows, options):
    seen = []
    trainer = trainer_of(
        tmp_path, rows, streamed_metrics=True, streamed_entropy=True, compute_metrics=lambda p: seen.append(p) or {},
        **options,
    )  # fmt: skip
    trainer.evaluate()
    logp, labels, mask = dense(tmp_path, rows)
    predictions, label_ids = seen[0]
    assert (
        isinstance(predictions, StreamedMetrics) and label_ids.shape == predictions.top.shape == predictions.logp.shape
    )
    assert np.array_equal(label_ids[:, 1:][mask], labels)
    assert np.array_equal(predictions.top[:, 1:][mask], logp.argmax(-1))
    expected = logp.gather(-1, labels[:, None])[:, 0]
    np.testing.assert_allclose(predictions.logp[:, 1:][mask], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predictions.entropy[:, 1:][mask], -(logp.exp() * logp).sum(-1), rtol=1e-4)
    for field in predictions:
        assert (field[:, 1:][~mask] == -100).all() and (field[:, 0] == -100).all()


def test_metrics_batch_by_batch_by_name_and_in_predict(tmp_path, rows):
    """What users write for the stock trainer's options, on streamed predictions."""
    hits = []

    def accuracy(found, compute_result=True):
        predictions = found.predictions
        right = (predictions.top == found.label_ids) & (predictions.top != -100)
        hits.append((int(right.sum()), int((predictions.top != -100).sum())))
        totals = np.sum(hits, 0)
        return {"share": totals[0] / totals[1]} if compute_result else {}

    logp, labels, _ = dense(tmp_path, rows)
    expected = float((logp.argmax(-1) == labels).double().mean())
    trainer = trainer_of(tmp_path, rows, streamed_metrics=True, compute_metrics=accuracy, batch_eval_metrics=True)
    assert trainer.evaluate()["eval_share"] == pytest.approx(expected)
    assert len(hits) == 3
    hits.clear()
    sets = {"one": rows, "two": rows.select([2])}
    found = trainer_of(tmp_path, sets, streamed_metrics=True, compute_metrics=accuracy, eval_top_k=2).evaluate()
    assert found["eval_one_share"] == pytest.approx(expected)
    assert 0 <= found["eval_two_top2_accuracy"] <= 1 and found["eval_one_top2_accuracy"] >= expected
    output = trainer_of(tmp_path, rows, streamed_metrics=True).predict(rows)
    assert isinstance(output.predictions, StreamedMetrics) and output.predictions.entropy is None
    right = (output.predictions.top == output.label_ids) & (output.predictions.top != -100)
    assert right.sum() / (output.predictions.top != -100).sum() == pytest.approx(expected)
    apart = trainer_of(tmp_path, rows, streamed_metrics=True, eval_do_concat_batches=False).predict(rows)
    assert [len(batch.top) for batch in apart.predictions] == [2, 2, 1]


def test_no_logits_are_made_or_kept(tmp_path, rows):
    """The largest tensor is a parameter, and what Python and numpy hold of predictions is far below the logits."""
    model, rows = tiny(vocab_size=40 * V), datasets.concatenate_datasets([rows] * 2)
    trainer = trainer_of(
        tmp_path, rows, model=model, streamed_metrics=True, streamed_entropy=True, compute_metrics=lambda p: {},
        memory_budget=1 << 14, eval_top_k=3, eval_calibration=True, per_device_eval_batch_size=10,
    )  # fmt: skip
    tokens = len(rows) * max(map(len, rows["input_ids"]))
    assert max(p.numel() for p in model.parameters()) < tokens * 40 * V
    tracemalloc.start()
    with Largest() as largest:
        trainer.evaluate()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest.numel <= max(p.numel() for p in model.parameters())
    assert peak < tokens * 40 * V * 4 / 2, "bytes of numpy arrays, that of the logits being twice as many"


def rank_of(rank, folder, rows):
    trainer = trainer_of(
        folder, rows, streamed_metrics=True, per_device_eval_batch_size=1, eval_top_k=5, eval_calibration=True
    )
    output = trainer.predict(rows)
    return output.predictions, output.metrics


def test_two_processes_are_one(tmp_path, rows):
    """Launched: two gloo ranks, which gather predictions of unequal lengths."""
    even = rows.select(range(4))  # of an odd number, ranks repeat a row in the sums
    found = run_ranks(2, rank_of, tmp_path, str(tmp_path), even)
    expected = trainer_of(tmp_path, even, streamed_metrics=True, eval_top_k=5, eval_calibration=True).predict(even)
    for predictions, metrics in found:
        assert np.array_equal(predictions.top, expected.predictions.top)
        np.testing.assert_allclose(predictions.logp, expected.predictions.logp, rtol=1e-5)
        for name in ("test_top5_accuracy", "test_calibration_error", "test_perplexity"):
            assert metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5), name


def test_sixteen_bits_are_no_worse_than_dense(tmp_path, rows):
    logp, labels, mask = dense(tmp_path, rows)
    same, _, _ = dense(tmp_path, rows, tiny(dtype=torch.bfloat16))
    found = trainer_of(tmp_path, rows, model=tiny(dtype=torch.bfloat16), streamed_metrics=True).predict(rows)
    ours = torch.as_tensor(found.predictions.logp)[:, 1:][mask].double()
    truth, theirs = (x.gather(-1, labels[:, None])[:, 0] for x in (logp, same))
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-5


def test_trainers_of_a_method_measure_too(tmp_path, rows):
    found = trainer_of(tmp_path, rows, NoiseFiTTrainer, eval_top_k=5, streamed_metrics=True).evaluate()
    plain = trainer_of(tmp_path, rows, eval_top_k=5).evaluate()
    assert found["eval_top5_accuracy"] == plain["eval_top5_accuracy"]


def test_labels_of_weight_zero_do_not_count(tmp_path, rows):
    weighted = rows.add_column("loss_weight", [1.0, 0.0, 1.0, 0.0, 1.0])
    found = trainer_of(tmp_path, weighted, streamed_metrics=True, eval_top_k=5).predict(weighted)
    plain = trainer_of(tmp_path, rows, eval_top_k=5).evaluate(rows.select([0, 2, 4]))
    assert found.metrics["test_top5_accuracy"] == pytest.approx(plain["eval_top5_accuracy"])
    assert (found.predictions.top[1] == -100).all() and (found.predictions.top[2] != -100).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_top_k": 0}, "eval_top_k is 0: choose"),
        ({"streamed_entropy": True}, "streamed_entropy is True, but streamed_metrics is False"),
        (
            {"streamed_metrics": True, "prediction_loss_only": True},
            "streamed_metrics is True, but so is prediction_loss",
        ),
        (
            {"streamed_metrics": True, "preprocess_logits_for_metrics": lambda logits, labels: logits},
            "preprocess_logits_for_metrics is given, but streamed_metrics is True",
        ),
        ({"eval_bits_per_byte": True}, "eval_bits_per_byte is True, but processing_class is NoneType"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer_of(tmp_path, rows, **options)


def test_predictions_of_what_has_no_labels_are_refused(tmp_path, rows):
    trainer = trainer_of(tmp_path, rows, streamed_metrics=True)
    trainer.data_collator = lambda examples: {"input_ids": collate(examples)["input_ids"]}
    with pytest.raises(ValueError, match=r"^streamed_metrics is True, but a batch has no labels"):
        trainer.predict(rows)
