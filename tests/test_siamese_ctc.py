"""SiameseCTCTrainer: three steps as a dense loop, counting, padding, saving, resuming; and distances of edits."""

import copy
import math
import random
import runpy
from pathlib import Path

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCTC, BertConfig, BertForMaskedLM, T5Config, T5Model

from hf_xent import hub
from hf_xent.classes.heads import inputs_of
from hf_xent.metrics.edits import edit_distance, error_rate
from hf_xent.ops import sinkhorn_divergence
from hf_xent.speech import write_wav
from hf_xent.trainers import SiameseCTCConfig, SiameseCTCTrainer
from hf_xent.trainers.siamese_collator import SiameseCollator
from hf_xent.trainers.siamese_text import TextStates, frame_mask, last_states, width_of
from support.ranks import run_ranks
from support.speech import CHARACTERS, MODELS, D, rows_of, text_encoder

LENGTHS = {"wav2vec2": lambda n: ((n - 4) // 3 + 1 - 3) // 2 + 1, "wav2vec2_bert": lambda n: n}
LENGTHS |= {"hubert": LENGTHS["wav2vec2"], "lasr": lambda n: ((n - 5) // 2 + 1 - 5) // 2 + 1}
LENGTHS |= {"adapter": lambda n: (LENGTHS["wav2vec2"](n) - 1) // 2 + 1}
LENGTHS |= {"parakeet": lambda n: (n - 1) // 2 + 1}


def trainer_of(folder, model=None, text=None, rows=None, **options):
    common = {
        "max_steps": 3, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 3, "logging_steps": 1,
        "use_cpu": True, "report_to": [], "learning_rate": 0.01, "optim": "sgd", "max_grad_norm": 0.0,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant", "iterations": 20,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if options.get("ot_weight") == 0:
        common.pop("iterations")
    else:
        text = text or text_encoder()
    args = SiameseCTCConfig(output_dir=str(folder), **{**common, **options})
    data = datasets.Dataset.from_list(rows or rows_of())
    return SiameseCTCTrainer(model or MODELS["wav2vec2"][0](), text, args, train_dataset=data, eval_dataset=data)


def fit(folder, resume=None, **options):
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def placed(states, weight=1.0):
    position = torch.arange(len(states)) / max(len(states) - 1, 1) * weight
    return torch.cat([states, position[:, None]], 1)[None]


def head_of(model):
    return model.lm_head if hasattr(model, "lm_head") else model.ctc_head


def dense_rows(name, model, text, rows, layer=None, weight=1.0):
    """CTC and divergence of each row, alone in its batch, without any padding."""
    column = MODELS[name][1][0]
    for row in rows:
        with inputs_of(head_of(model)) as seen:  # there is no dropout before it
            output = model(**{column: torch.tensor(row[column])[None]})
        frames = LENGTHS[name](len(row[column]))
        assert output.logits.shape[1] == frames
        logp = output.logits[0].log_softmax(-1)
        labels, ids = torch.tensor(row["labels"]), torch.tensor(row["text_input_ids"])[None]
        sizes = torch.tensor([frames]), torch.tensor([len(labels)])
        ctc = F.ctc_loss(logp[:, None], labels[None], *sizes, reduction="sum", zero_infinity=True)
        states = text(input_ids=ids).last_hidden_state[0]
        states = states if layer is None else layer(states)
        sides = placed(seen[0][0], weight), placed(states, weight)
        yield ctc, sinkhorn_divergence(*sides, iterations=20)[0], len(labels)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("wav2vec2", D),
        ("wav2vec2_bert", 6),
        ("parakeet", D),
        pytest.param("hubert", 6, marks=pytest.mark.slow),
    ],
)
def test_three_steps_are_those_of_a_dense_loop(name, width, tmp_path):
    """Rows one by one, so that nothing of a batch or of its padding takes part."""
    options = {} if name == "parakeet" else {"ctc_loss_reduction": "sum"}
    model, text, rows = MODELS[name][0](**options), text_encoder(width), rows_of(name)
    reduced = model.config.ctc_loss_reduction
    trainer = trainer_of(tmp_path, model, text, rows, ot_weight=0.3, position_weight=0.7)
    theirs, their_text, layer = copy.deepcopy((model, text, trainer.text.projection))
    del theirs.hf_xent_loss_state
    assert (layer is None) == (width == D)
    own = [*theirs.parameters(), *their_text.parameters(), *(() if layer is None else layer.parameters())]
    optimizer, losses = torch.optim.SGD(own, 0.01), []
    if name == "parakeet":  # its batch normalization sees the rows of a batch together, and padding
        theirs.eval(), model.eval()
        trainer.model.train = lambda mode=True: trainer.model
    for _ in range(3):
        found = list(dense_rows(name, theirs.train(name != "parakeet"), their_text.train(), rows, layer, 0.7))
        terms = [(c if reduced == "sum" else c / n) + 0.3 * s for c, s, n in found]
        loss = sum(terms) / len(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trainer.train()
    assert entries(trainer, "loss") == pytest.approx(losses, rel=2e-4)
    assert entries(trainer, "divergence")[-1] == pytest.approx(sum(s.item() for _, s, _ in found) / 6, rel=2e-3)
    pairs = [(model, theirs), (text, their_text)]
    for ours, their in (pair for a, b in pairs for pair in zip(a.parameters(), b.parameters(), strict=False)):
        torch.testing.assert_close(ours, their, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_frames_are_counted_as_the_model_counts_them(name):
    model, batch = MODELS[name][0](), SiameseCollator()(rows_of(name))
    column = MODELS[name][1][0]
    speech = {key: batch[key] for key in (column, "attention_mask")}
    with last_states(model) as seen, inputs_of(head_of(model)) as before:
        logits = model(**speech).logits
    [states] = seen
    assert torch.equal(states, before[0]), "what the head sees"
    assert states.shape == (6, logits.shape[1], width_of(model))
    kept = frame_mask(model, batch["attention_mask"], states.shape[1], states)
    assert kept.sum(1).tolist() == [LENGTHS[name](len(row[column])) for row in rows_of(name)]
    assert bool(frame_mask(model, None, 3, states).all())


@pytest.mark.parametrize("reduction", ["sum", pytest.param("mean", marks=pytest.mark.slow)])
def test_accumulation_does_not_change_a_step(reduction, tmp_path):
    found = []
    for size, accumulation in ((6, 1), (4, 2)):
        model = MODELS["wav2vec2"][0](ctc_loss_reduction=reduction)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = fit(tmp_path, model=model, text=text_encoder(6), **sizes)
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        found.append(([entries(trainer, name)[0] for name in ("loss", "ctc", "divergence")], weights))
    for numbers, weights in found[1:]:
        assert numbers == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing(tmp_path):
    trainer, rows = trainer_of(tmp_path), rows_of()
    batch = SiameseCollator(text_pad=0)(rows)
    wide = {name: F.pad(value, (0, 7), value=-100 if name == "labels" else 0) for name, value in batch.items()}
    wide["text_input_ids"][:, -7:] = 5  # whatever ids stand there
    trainer.model.eval().double()  # but transformers computes CTC in float32
    for given in (batch, wide):
        given["input_values"] = given["input_values"].double()
    losses = []
    for given in (batch, wide):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, given)
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    single = [SiameseCollator()([row]) for row in rows]
    alone = [trainer.compute_loss(trainer.model, {**x, "input_values": x["input_values"].double()}) for x in single]
    assert losses[0][0].item() == pytest.approx(sum(alone).item() / len(alone), rel=1e-4)


def test_gradients_reach_both_sides_unless_the_text_is_detached(tmp_path):
    for detach, width in ((False, D), (True, 6)):
        text = text_encoder(width)
        before = copy.deepcopy(text.state_dict())
        trainer = trainer_of(tmp_path, text=text, detach_text=detach, max_steps=1)
        layer = copy.deepcopy(trainer.text.projection)
        trainer.train()
        same = all(torch.equal(value, before[name]) for name, value in text.state_dict().items())
        assert same == detach and text.training != detach
        assert (trainer.text.projection is None) == (width == D)
        assert layer is None or not torch.equal(layer.weight, trainer.text.projection.weight)


def test_without_transport_it_is_the_model_of_ctc_alone(tmp_path):
    trainer = fit(tmp_path, ot_weight=0, max_steps=1)
    assert trainer.text is None and not entries(trainer, "divergence")
    assert entries(trainer, "ctc") == pytest.approx(entries(trainer, "loss"), rel=1e-5)
    both = fit(tmp_path, ot_weight=0.5, max_steps=1)
    divergence, ctc = entries(both, "divergence")[0], entries(both, "ctc")[0]
    assert entries(both, "loss")[0] == pytest.approx(ctc + 0.5 * divergence, rel=1e-4)
    assert ctc == pytest.approx(entries(trainer, "ctc")[0], rel=1e-6)
    again = fit(tmp_path, position_weight=0.0, max_steps=1)
    assert entries(again, "divergence")[0] < divergence


def test_training_brings_both_sides_together(tmp_path):
    options = {"learning_rate": 0.05, "optim": "adamw_torch", "max_steps": 12, "logging_steps": 12}
    trainer = trainer_of(tmp_path, ot_weight=1.0, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_divergence"] < 0.5 * before["eval_divergence"] and after["eval_ctc"] < before["eval_ctc"]
    assert after["eval_loss"] == pytest.approx(after["eval_ctc"] + after["eval_divergence"], rel=1e-4)
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape[0] == 6 and found.predictions.shape[2] == CHARACTERS


def test_a_resumed_run_is_the_same_run(tmp_path):
    def options():
        common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2}
        return {**common, "text": text_encoder(6), "optim": "adamw_torch", "train_sampling_strategy": "random"}

    whole = fit(tmp_path, **options())
    resumed = fit(tmp_path, resume=str(tmp_path / "checkpoint-2"), **options())
    assert entries(resumed, "loss") == entries(whole, "loss")
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_both_are_saved_with_a_card(tmp_path):
    text = text_encoder(6)
    trainer = fit(tmp_path / "out", text=text)
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(license="mit")
    card = hub.validate(tmp_path / "out")
    assert card.data.pipeline_tag == "automatic-speech-recognition" and card.data.library_name == "transformers"
    for part in ("Text encoder: BertModel, trained, saved in text_encoder, a linear layer", "| `ot", "2301.11716"):
        assert part in card.text
    model = AutoModelForCTC.from_pretrained(tmp_path / "out")
    batch = SiameseCollator()(rows_of())
    speech = {name: batch[name] for name in ("input_values", "attention_mask")}
    trainer.model.eval()
    assert torch.equal(model(**speech).logits, trainer.model(**speech).logits)
    back = TextStates(AutoModel.from_pretrained(tmp_path / "out" / "text_encoder"), D)
    back.load_projection(tmp_path / "out")
    texts = batch["text_input_ids"], batch["text_attention_mask"]
    torch.testing.assert_close(back.eval()(*texts), trainer.text.eval()(*texts))
    assert not any("hf_xent" in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"nowhere has no text_encoder/projection.safetensors for a text encoder of"):
        back.load_projection("nowhere")


def refused(folder, message, **options):
    with pytest.raises(ValueError, match=message):
        fit(folder, **options)


def test_refusals(tmp_path):
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    refused(tmp_path, "model is a BertForMaskedLM, which has no CTC loss: pass", model=BertForMaskedLM(bert))
    inner = MODELS["wav2vec2"][0]().wav2vec2
    refused(tmp_path, "model is a Wav2Vec2Model, which has no CTC loss", model=inner)
    both = T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    refused(tmp_path, "text_encoder is a T5Model, an encoder and a decoder: pass text_encoder.get_encoder", text=both)
    refused(tmp_path, "ot_weight is 0, so text_encoder has no effect", ot_weight=0, text=text_encoder())
    args = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(ValueError, match=r"ot_weight is 0.1, but text_encoder is None: pass"):
        SiameseCTCTrainer(MODELS["wav2vec2"][0](), None, SiameseCTCConfig(**args))
    with pytest.raises(ValueError, match="text_encoder is the model itself"):
        SiameseCTCTrainer(model := MODELS["wav2vec2"][0](), model, SiameseCTCConfig(**args))
    for name, value in {"position_weight": 2.0, "blur": 0.1, "iterations": 5, "detach_text": True}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}, but ot_weight is 0, so nothing is transported"):
            SiameseCTCConfig(**args, ot_weight=0, **{name: value})
    for name, value in {"ot_weight": -0.1, "position_weight": -1.0, "blur": 0.0, "iterations": 0}.items():
        refused(tmp_path, f"{name} is {value!r}: choose", **{name: value})
    refused(tmp_path, "label_smoothing_factor is 0.1, but CTC sums over alignments", label_smoothing_factor=0.1)
    rows = rows_of()
    no_text = [{name: x for name, x in row.items() if name != "text_input_ids"} for row in rows]
    refused(tmp_path, "the transport needs text_input_ids: add the column", rows=no_text)
    no_labels = [{name: x for name, x in row.items() if name != "labels"} for row in rows]
    refused(tmp_path, "but no labels", rows=no_labels)
    empty = [*rows[:5], {**rows[5], "text_input_ids": []}]
    refused(tmp_path, r"of speech \(x\) and text \(y\) in a batch, y has no position that counts in row 5", rows=empty)
    with pytest.raises(ValueError, match="args is a TrainingArguments: SiameseCTCTrainer takes"):
        from transformers import TrainingArguments

        SiameseCTCTrainer(MODELS["wav2vec2"][0](), text_encoder(), TrainingArguments(str(tmp_path)))


def on_a_rank(rank, folder):
    trainer = fit(folder, text=text_encoder(6), per_device_train_batch_size=3)
    return [p.detach().clone() for p in trainer.model.parameters()], entries(trainer, "loss")


@pytest.mark.slow  # two processes import the libraries
def test_two_processes_are_one(tmp_path):
    one = fit(tmp_path, text=text_encoder(6))
    for weights, losses in run_ranks(2, on_a_rank, tmp_path, str(tmp_path / "out")):
        torch.testing.assert_close(weights, [*one.model.parameters()], rtol=1e-4, atol=1e-6)
        assert losses == pytest.approx(entries(one, "loss"), rel=1e-4)


def levenshtein(one, other):
    """The recursion, without a table."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return levenshtein(one[1:], other[1:])
    return 1 + min(levenshtein(*pair) for pair in ((one[1:], other), (one, other[1:]), (one[1:], other[1:])))


def test_distances_of_edits():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance(["please", "hold", "the", "line"], ["hold", "the", "line", "please"]) == 2
    draw = random.Random(0)
    for _ in range(300):
        one, other = ([draw.randrange(3) for _ in range(draw.randrange(6))] for _ in range(2))
        assert edit_distance(one, other) == levenshtein(one, other)
    long = "".join(draw.choices("ab", k=300))
    assert edit_distance(long, long[40:]) == 40
    assert error_rate(["abc", "d"], ["abd", ""]) == 0.5 and error_rate(["a"], ["bcd"]) == 3.0
    assert math.isclose(error_rate(["ab", "cd"], ["", ""]), 1.0)
    with pytest.raises(ValueError, match="references are 1 and hypotheses 2: give one for each"):
        error_rate(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="references are empty: give at least one"):
        error_rate([""], ["a"])


EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = ["agent", "busy now", "call", "dial again", "enter", "forward", "goodbye", "hello"]


@pytest.fixture
def prompts(tmp_path):
    """A folder of made-up sounds with transcripts in two languages."""
    generator = torch.Generator().manual_seed(0)
    for language in ("en", "fr"):
        place = tmp_path / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt"
        sounds = tmp_path / f"usr/share/asterisk/sounds/{language}_X"
        place.parent.mkdir(parents=True), sounds.mkdir(parents=True)
        words = [text if language == "en" else text[::-1] for text in PROMPTS]
        place.write_text("".join(f"{i}: {text.capitalize()}.\n" for i, text in enumerate(words)))
        for i in range(len(PROMPTS)):
            wave = 0.1 * torch.randn(4000 + 500 * i, generator=generator)
            write_wav(sounds / f"{i}.wav", wave.clamp(-1, 0.99), 8000)
    return str(tmp_path)


@pytest.mark.slow  # ten models are trained for a step
@pytest.mark.filterwarnings("ignore:.*encoder:UserWarning")
def test_the_examples_compare_all_arms(prompts, tmp_path, monkeypatch):
    """Pre-training and then translation, of six rows; a second call runs nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import siamese_arms
    import spoken_prompts

    monkeypatch.setattr(spoken_prompts, "TEST", 2)
    assert spoken_prompts.written(spoken_prompts.spelled("D'après 12 É!")) == "d'après é"
    train, test = spoken_prompts.split(prompts, 0)
    assert (len(train), len(test)) == (6, 2) and train[0]["input_features"].shape[1] == 160
    shared = {"seeds": 1, "epochs": 2}  # the first step of a warm-up has the rate 0
    before = runpy.run_path(str(EXAMPLES / "siamese_ctc.py"))
    found = before["main"](prompts, output=tmp_path / "out", **shared)
    assert found.keys() == set(before["ARMS"])
    assert found["CTC"][0]["CER"] == found["CTC, text later"][0]["CER"] == found["CTC, no text"][0]["CER"]
    assert found["CTC, text later"][0]["S"] != found["CTC, no text"][0]["S"]
    after = runpy.run_path(str(EXAMPLES / "speech_translation.py"))
    translated = after["main"](prompts, tmp_path / "out" / "models", output=tmp_path / "st", **shared)
    assert translated.keys() == set(after["ARMS"])
    nats = {arm: rows[0]["nats"] for arm, rows in translated.items()}
    assert len(set(nats.values())) == len(nats), "starts differ"
    silent = translated["no speech"][0]
    assert silent["nats"] == pytest.approx(silent["other speech"], abs=1e-6)
    for name in ("siamese", "written_by_decoder"):
        monkeypatch.setattr(siamese_arms, name, None)
    assert before["main"](prompts, output=tmp_path / "out", **shared) == found
