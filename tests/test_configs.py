"""Every file of examples/configs/ is run as it stands, but for the model, the data, the steps and the sizes."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from hf_xent import cli, hub
from hf_xent.models.zero_shot import ZeroShot
from hf_xent.recipes import RECIPES, run
from hf_xent.speech import write_wav
from hf_xent.trainers.siamese_text import PROJECTION
from support import encoders
from support.models import tiny, tiny_tokenizer
from support.pictures import write_pictures
from support.speech import of_waves, text_encoder

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
LETTERS = "the quick brown fox jumps over the lazy dog A B Africans Americans Asians Europeans "
COMMON = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
COMMON |= {
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "eval_rows": 4,
    "warmup_steps": 0,
    "per_device_eval_batch_size": 4,
}
ROWS = {"dataset_train_split": "train[:16]"}
ON_TINY = {
    "sft": {"dataset_train_split": "train[:4]", "max_length": 32},
    **{name: {"dataset_train_split": "train[:2]", "block_size": 16} for name in ("emo", "ln-free")},
    "noisefit": {"dataset_train_split": "train[:2]", "block_size": 16, "num_noise_layers": 2},
    "spce": ROWS, "spo": ROWS,
    "osp": {**ROWS, "num_generations": 2, "max_new_tokens": 4, "dtype": "float32", "eval_rows": 8},
    "f2c": ROWS,
    "dxo": {"dataset_train_split": "train[:80]", "eval_rows": 20, "per_device_train_batch_size": 4},
    "encoder-calibration": {"steps": 2}, "siamese-ctc": {"dataset_train_split": "train"},
    "eisl": {}, "self-distil-qa": {"dataset_config": None, "dataset_train_split": "train", "max_length": 32,
                                   "doc_stride": 4},
}  # fmt: skip
TRAINERS = {
    "dxo": "DXOTrainer", "eisl": "EISLTrainer", "emo": "EMOTrainer", "encoder-calibration": "EncoderCalibrationTrainer",
    "f2c": "F2CTrainer", "ln-free": "LNRemovalTrainer", "noisefit": "NoiseFiTTrainer", "osp": "OSPTrainer",
    "self-distil-qa": "SelfDistilQATrainer", "sft": "StreamedSFTTrainer", "siamese-ctc": "SiameseCTCTrainer",
    "spce": "SPCETrainer", "spo": "SPOTrainer",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of the tiny models, and of data that no package has."""
    home = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer(LETTERS * 8)
    tiny(std=0.05, max_position_embeddings=512).save_pretrained(home / "llama")
    bert = transformers.BertConfig(
        **{**encoders.TEXT, "max_position_embeddings": 256}, pad_token_id=0, type_vocab_size=2
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(bert).save_pretrained(home / "bert")
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    t5 = transformers.T5Config(**sizes, vocab_size=97, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(home / "t5")
    for name in ("llama", "bert", "t5"):
        tokenizer.save_pretrained(home / name)
    _clip(home / "clip", tokenizer)
    _speech(home)
    write_pictures(home / "pictures")
    pairs = [{"prompt": f"the fox {i}", "completion": "jumps over the dog"} for i in range(12)]
    _write(home / "pairs.jsonl", pairs)
    asked = {"question": "who jumps?", "context": "the quick fox jumps over the lazy dog", "answer": "quick fox"}
    _write(home / "questions.jsonl", [asked] * 12)
    gc.collect()
    gc.freeze()  # training collects garbage often, which takes long in a process with so many modules
    yield home
    gc.unfreeze()


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def _clip(folder, tokenizer):
    """CLIP for pictures of 8 pixels a side, in three channels."""
    vision = {**encoders.IMAGE, "num_channels": 3}
    text = {**encoders.TEXT, **encoders.ENDS, "max_position_embeddings": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=encoders.D)
    encoders.built("CLIPModel", config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(folder)


def _speech(home):
    """A speech model that writes four letters, its text encoder, and sounds at half its rate."""
    of_waves("Wav2Vec2").save_pretrained(home / "wav2vec2")
    vocabulary = home / "vocab.json"
    vocabulary.write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4, "C": 5}))
    letters = transformers.Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None)
    sounds = transformers.Wav2Vec2FeatureExtractor(sampling_rate=200)
    transformers.Wav2Vec2Processor(sounds, letters).save_pretrained(home / "wav2vec2")
    text_encoder(width=6).save_pretrained(home / "text")
    short = tiny_tokenizer("a b c ")
    short.save_pretrained(home / "text")
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(8):
        write_wav(home / f"{i}.wav", torch.rand(30 + 4 * i, generator=generator) - 0.5, 100)
        rows.append({"file": f"{i}.wav", "text": "abc"[: 2 + i % 2]})
    _write(home / "sounds.jsonl", rows)


def places(name, home):
    """The model and the data of a recipe, where they are not those of the file."""
    found = {"model_name_or_path": home / "llama"}
    found |= {
        "dxo": {"model_name_or_path": home / "bert"},
        "eisl": {"model_name_or_path": home / "t5", "dataset_name": home / "pairs.jsonl"},
        "self-distil-qa": {"model_name_or_path": home / "bert", "dataset_name": home / "questions.jsonl"},
        "encoder-calibration": {"model_name_or_path": home / "clip", "dataset_name": home / "pictures"},
        "siamese-ctc": {
            "model_name_or_path": home / "wav2vec2",
            "dataset_name": home / "sounds.jsonl",
            "text_encoder": home / "text",
        },
    }.get(name, {})
    return found


def ran(name, path, home, output, **more):
    """The result of a file's run on the tiny model."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings |= {**COMMON, **ON_TINY[name], **places(name, home), "output_dir": output, **more}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    smaller = output.with_suffix(".yaml")
    smaller.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return run(name, ["--config", str(smaller)])


def loaded(name, folder, start):
    """What a run has saved, loaded as its users do."""
    if (folder / "adapter_config.json").is_file():
        import peft

        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), folder)
    kinds = {"dxo": "SequenceClassification", "self-distil-qa": "QuestionAnswering", "eisl": "Seq2SeqLM"}
    kinds |= {"siamese-ctc": "CTC"}
    if name == "encoder-calibration":
        return ZeroShot.from_pretrained(folder, AutoModel.from_pretrained(start))
    return getattr(transformers, f"AutoModelFor{kinds.get(name, 'CausalLM')}").from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:the data has one class only:UserWarning")
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in RECIPES], ids=lambda path: path.stem)
def test_the_file_of_a_recipe_runs(path, home, tmp_path):
    name, output = path.stem, tmp_path / "out"
    result = ran(name, path, home, output)
    assert len(result.outcome.losses) == 2 and all(map(math.isfinite, result.outcome.losses))
    assert result.summary["steps"] == 2 and len(result.outcome.seconds) == 2
    assert math.isfinite(result.summary["after"]["loss"])
    written = json.loads((output / "results.json").read_text())
    assert written["outcomes"][0]["losses"] == result.outcome.losses and written["run"]["recipe"] == name
    assert f"{TRAINERS[name]}" in (output / "README.md").read_text(encoding="utf-8")
    model = loaded(name, output, str(places(name, home)["model_name_or_path"]))
    assert all(p.isfinite().all() for p in model.parameters())
    if name == "siamese-ctc":
        assert (output / "text_encoder" / PROJECTION).is_file()


def test_every_recipe_has_a_file():
    assert {path.stem for path in CONFIGS} == {*RECIPES, "distill", "classify"} and set(TRAINERS) == {*RECIPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_says_how_it_is_run(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    command = f"{path.stem} train" if path.stem in ("ln-free", "distill") else path.stem
    assert f"hf-xent {command} --config examples/configs/{path.name}" in first
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings["output_dir"] == f"out/{path.stem}" and {"model_name_or_path", "dataset_name"} <= set(settings)


def invoked(*words):
    """The summary of a command with options of its own."""
    found = CliRunner().invoke(cli.app, [*map(str, words), "--json"], catch_exceptions=False)
    return json.loads(found.stdout)


@pytest.fixture
def distilling(home, tmp_path):
    """`hf-xent distill train` of the file, on the tiny model."""
    file = CONFIGS[0].with_name("distill.yaml")
    words = ["distill", "train", "--config", file, "--model_name_or_path", home / "llama", "--teacher", home / "llama"]
    sizes = ["--max_steps", 2, "--per_device_train_batch_size", 2, "--eval_rows", 2, "--block-size", 16]
    return [
        *words,
        *sizes,
        "--gradient_accumulation_steps",
        1,
        "--split",
        "train[:6]",
        "--output_dir",
        tmp_path / "out",
    ]


@pytest.fixture
def classifying(home, tmp_path):
    """`hf-xent classify` of the file, on the tiny model."""
    words = ["classify", "--config", CONFIGS[0].with_name("classify.yaml"), "--model", home / "llama", "--split"]
    return [*words, "train[:60]", "--num_train_epochs", 0.5, "--output", tmp_path / "out"]


def settings_of(folder):
    return json.loads((folder / "results.json").read_text())["run"]


def test_the_file_of_distillation_runs_and_is_pushed(distilling, home, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(hub, "check_rights", seen.append)  # before the training
    monkeypatch.setattr(hub, "push", lambda folder, name, **options: seen.append((folder, name)))
    summary = invoked(*distilling, "--weight_decay", 0.25, "--push", "--hub_model_id", "me/student")
    settings, folder = settings_of(tmp_path / "out"), tmp_path / "out"
    assert summary["steps"] == 2 and math.isfinite(summary["last_loss"]) and summary["repository"] == "me/student"
    assert settings["more"] == {"weight_decay": 0.25, "hub_model_id": "me/student"} and settings["lora"] == 16
    assert settings["model"] == str(home / "llama") and settings["objective"] == "jsd:beta=0.5"  # words, then the file
    assert (
        seen == ["me/student", (str(folder), "me/student")]
        and "DistillationTrainer" in (folder / "README.md").read_text()
    )
    assert torch.load(folder / "training_args.bin", weights_only=False).weight_decay == 0.25


def test_the_file_of_classification_runs(classifying, tmp_path):
    summary, settings = invoked(*classifying), settings_of(tmp_path / "out")
    assert summary["steps"] == 2 and math.isfinite(summary["last_loss"]) and len(summary["classes"]) > 1
    assert settings["loss"] == "focal:gamma=2" and settings["more"] == {"weight_decay": 0.01, "warmup_steps": 0.1}
    assert "ClassTrainer" in (tmp_path / "out" / "README.md").read_text()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == len(summary["classes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight_deca", "1"], "weight_deca is no argument of `hf-xent classify`: did you mean 'weight_decay'"),
        (["--weight_decay", "much"], "weight_decay.*invalid float value: 'much'"),
        (["--epochs", "2"], "num_train_epochs and epochs are both given, which are the same"),
        (["--lora_r", "2"], "lora_r is 2, but use_peft is False: set use_peft, too"),
        (["--hub_token", "x"], "hub_token is given, but tokens are written nowhere: log in"),
        (["--hub_model_id", "a/b"], "hub_model_id is given, but push is not"),
        (["--push", "--no-save"], "push is given, but the model is not saved"),
        (["--config"], "config is not given: name a YAML file"),
        (["--gather", "stray"], "stray"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(words, message, classifying):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, [*map(str, classifying), *words], catch_exceptions=False)


def test_epochs_are_refused_where_steps_are_counted(distilling):
    with pytest.raises(ValueError, match="num_train_epochs is given, but the command counts optimizer steps"):
        invoked(*distilling, "--num_train_epochs", 2)


def test_a_file_with_an_option_under_two_names_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a\nmodel_name_or_path: b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="config has model and model_name_or_path, which are the same"):
        invoked("classify", "--config", path)


def test_all_fields_are_listed_on_demand():
    shown = CliRunner().invoke(cli.app, ["distill", "train", "--help-all"]).stdout
    assert "--weight_decay" in shown and "--sampling_temperature" in shown and "--load_in_4bit" not in shown
