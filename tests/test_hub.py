"""Cards that hold, and folders, trainers and datasets that make the round trip to a Hub on this machine, failures too.

huggingface_hub reads HF_ENDPOINT when it is imported, so what talks to the Hub runs in one process of its own.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_xent import cli, hub, ln_free
from hf_xent.trainers import METHODS, LNRemovalConfig, LNRemovalTrainer, XentConfig, XentTrainer
from support.hub_process import elsewhere
from support.models import V, tiny, tiny_tokenizer

HEAD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags:
- hf_xent
---
"""
OLD_HUB = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2"), reason="huggingface_hub 1.5 gives a cut upload up at once"
)
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module", name="elsewhere")
def _elsewhere(tmp_path_factory):
    with elsewhere(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(autouse=True)
def healthy(request):
    """No failure of one test is left for the next."""
    yield
    if "elsewhere" in request.fixturenames:
        request.getfixturevalue("elsewhere").hub.faults.clear()


@pytest.fixture
def folder(tmp_path):
    """A model of nothing: a card, a small file, and one for LFS."""
    made = tmp_path / "model"
    (made / "checkpoint-3").mkdir(parents=True)
    (made / "README.md").write_text(f"{HEAD}\n# Model\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(1000))
    (made / "odd [1].txt").write_text("a name that is a pattern")
    for private in (made / "checkpoint-3" / "optimizer.pt", made / "training_args.bin"):
        private.write_bytes(b"not for others")
    return made


def rows(n=12):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, V, (n, 8), generator=generator).tolist()]


def config(folder, kind=XentConfig, **options):
    common = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return kind(output_dir=str(folder), **{**common, **quiet, **options})


class Patient(TrainerCallback):
    """Waits for a push before the next step writes over its files."""

    def on_save(self, args, state, control, **kwargs):
        if args.push_to_hub:
            self.trainer.push_in_progress.wait_until_done()


def usage_on(card, **names):
    """What the code on a card makes: the names it leaves behind, run exactly as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, names)
    return names


def assert_same(a, b):
    """Up to rounding: weights that are mapped from a file lie elsewhere in memory."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def logits_by(card):
    """Logits of the model that a card's code loads, and its class."""
    model = usage_on(card)["model"]
    return logits(model), type(model).__name__


def trained(folder, model=None, train=None, **options):
    found = datasets.Dataset.from_list(rows()) if train is None else train
    model = tiny(std=0.05) if model is None else model
    patient, held_out = Patient(), found.select(range(4))
    made = XentTrainer(
        model, config(folder, **options), train_dataset=found, eval_dataset=held_out, callbacks=[patient]
    )
    patient.trainer = made
    made.train()
    made.evaluate()
    return made


def logits(model):
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS).logits)


# --- cards


def test_card_has_what_the_run_measured_and_was_told(tmp_path):
    trainer = trained(tmp_path, loss="focal:gamma=1.5", hub_token="hf_secret")
    trainer.create_model_card(model_name="fox", dataset="me/foxes", license="mit", tags="toy")
    card, last = hub.validate(tmp_path), trainer.evaluate()
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert data.datasets == ["me/foxes"] and data.tags == ["hf_xent", "xent", "toy"] and data.base_model is None
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        name: pytest.approx(last[f"eval_{name}"]) for name in ("loss", "perplexity", "entropy", "mean_token_accuracy")
    }
    assert not (tmp_path / ".eval_results").exists(), "held-out rows are no benchmark"
    assert (
        "- `gamma`: 1.5" in card.text and "arXiv:1708.02002" in card.text and "| `learning_rate` | 0.01 |" in card.text
    )
    assert f"| `perplexity` | {last['eval_perplexity']:.6g} | exp of the mean" in card.text
    assert "hf_secret" not in card.text and str(tmp_path) not in card.text
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TypeError, match="takes no licence"):
        trainer.create_model_card(licence="mit")


def test_results_of_benchmarks_are_those_that_were_measured(tmp_path):
    """Read back by huggingface_hub; and a benchmark is only what the user says is one."""
    trainer = trained(tmp_path)
    named = {"mean_token_accuracy": "me/quiz:words", "perplexity": "me/quiz:text", "loss": "other/quiz:default"}
    trainer.create_model_card(model_name="fox", license="mit", dataset="me/rows", benchmarks=named)
    measured = {r.metric_type: r.metric_value for r in hub.validate(tmp_path).data.eval_results}
    found = {}
    for file in (tmp_path / ".eval_results").iterdir():
        for entry in huggingface_hub.parse_eval_result_entries(yaml.safe_load(file.read_text())):
            found[f"{entry.dataset_id}:{entry.task_id}"] = entry.value
    assert found == {benchmark: measured[metric] for metric, benchmark in named.items()}
    assert {file.name for file in (tmp_path / ".eval_results").iterdir()} == {"me--quiz.yaml", "other--quiz.yaml"}
    for benchmarks, message in (
        ({"f1": "me/quiz:words"}, "benchmarks names 'f1', which was not measured: choose among loss, perplexity"),
        ({"loss": "me/quiz"}, "benchmarks has 'me/quiz' for loss: give the form 'user/dataset:task'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.create_model_card(license="mit", benchmarks=benchmarks)


def test_card_without_numbers_makes_none_up(tmp_path):
    trainer = XentTrainer(tiny(), config(tmp_path), train_dataset=datasets.Dataset.from_list(rows()))
    trainer.create_model_card(license="mit", dataset=[f"brown:{tmp_path}", str(tmp_path), "me/foxes"])
    card = hub.validate(tmp_path)
    assert card.data.datasets == ["me/foxes"] and str(tmp_path) not in card.text
    assert (
        card.data.eval_results is None and "The model was not evaluated" in card.text and "](loss.png)" not in card.text
    )
    assert not (tmp_path / ".eval_results").exists()


def test_every_trainer_writes_our_card():
    names = [(file, name) for file, found in METHODS.items() for name in found if name.endswith("Trainer")]
    assert len(names) >= 4
    for file, name in names:
        kind = getattr(importlib.import_module(f"hf_xent.trainers.{file}"), name)
        assert kind.create_model_card is hub.Carded.create_model_card, (
            f"{name}: hf_xent.hub.Carded goes before its bases"
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No head", "license is missing; library_name is missing; pipeline_tag is missing; tags is missing"),
        (HEAD.replace("license: mit", "licence: mit"), "license is missing; 'licence' is not a key of the Hub"),
        (HEAD.replace("mit", "unknown"), "license is 'unknown': say which"),
        (f"{HEAD}\n[More Information Needed]", "left from a template"),
        (f"{HEAD}\nby {{{{ author }}}}", "left from a template"),
        (HEAD.replace("tags:", "tags: ["), "the front matter does not parse"),
        (HEAD.replace("tags:", "model-index:\n- name: x\n  results:\n  - task: {}\ntags:"), "does not parse"),
        (None, "has no README.md"),
    ],
)
def test_faulty_cards_are_refused_offline(text, message, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        hub.validate(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_template_with_a_gap_is_an_error(tmp_path):
    from huggingface_hub import DatasetCardData
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        hub.render("dataset", DatasetCardData(license="mit"))
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: a\n  data_files:\n  - split: b\n    path: c-*\n---\n"
    )
    with pytest.raises(ValueError, match=r"split b has no file c-\*"):
        hub.validate(tmp_path, "dataset")


def test_templates_are_files_of_the_package():
    """So that every wheel has them; and each is one that some code renders."""
    package = Path(hub.__file__).parents[1]
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    names = {name for source in sources for name in re.findall(r'\brender\(\s*"(\w+)"', source)}
    assert {path.name for path in (package / "hub" / "templates").iterdir()} == {f"{name}.md" for name in names}
    assert len(names) == 5


# --- pushes


def pushed(*arguments, **options):
    """The address, or the error's text."""
    try:
        return hub.push(*arguments, **options)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def published(folder):
    return {name: file.read_bytes() for name, file in hub.files(folder).items()}


def test_push_is_the_folder_and_the_card_comes_last(elsewhere, folder):
    address = elsewhere.run(pushed, folder, "me/plain", private=True)
    repo = elsewhere.hub.repos["models/me/plain"]
    assert repo.branches["main"] == published(folder) and repo.private
    assert [paths for _, _, paths in repo.commits] == [
        ["config.json", "model.safetensors", "odd [1].txt"],
        ["README.md"],
    ]
    assert address == f"{elsewhere.hub.url}/me/plain/commit/{repo.sha('main')}"


def test_branches_and_pull_requests_leave_main_alone(elsewhere, folder):
    elsewhere.run(pushed, folder, "me/proposed")
    before = dict(elsewhere.files("me/proposed"))
    (folder / "config.json").write_text('{"new": 1}')
    assert elsewhere.run(pushed, folder, "me/proposed", create_pr=True).endswith("/me/proposed/discussions/1")
    elsewhere.run(pushed, folder, "me/proposed", revision="v2")
    for branch in ("refs/pr/1", "v2"):
        assert elsewhere.files("me/proposed", branch=branch) == published(folder)
    assert elsewhere.files("me/proposed") == before
    refused = elsewhere.run(pushed, folder, "me/proposed", revision="v2", create_pr=True)
    assert refused.startswith("ValueError: revision is 'v2'")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"method": "POST", "part": "/repos/create", "status": 401}, "log in with `hf auth login`"),
        ({"method": "POST", "part": "/commit/", "status": 403}, "a token with write access"),
        ({"method": "POST", "part": "/commit/", "status": 409}, "push again"),
        ({"method": "POST", "part": "/commit/", "status": 500}, "push again to resume"),
        ({"method": "POST", "part": "/commit/", "cut": True}, "push again to resume"),
        ({"method": "PUT", "part": "/_lfs/", "corrupt": True}, "push again to resume"),
        (
            {"method": "POST", "part": "/commit/", "corrupt": True},
            "config.json, odd [1].txt did not arrive as sent; push again",
        ),
    ],
    ids=lambda v: " ".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_failures_are_told_and_mended_by_pushing_again(elsewhere, folder, fault, message):
    repo, before = f"me/failing-{abs(hash(str(fault)))}", published(folder)
    elsewhere.hub.fail(**fault)
    told = elsewhere.run(pushed, folder, repo)
    assert told.startswith(f"RuntimeError: {repo} is not published: ") and message in told and "\n" not in told
    assert published(folder) == before
    if not fault.get("corrupt") or fault["method"] == "PUT":
        assert "README.md" not in getattr(elsewhere.hub.repos.get(f"models/{repo}"), "branches", {"main": {}})["main"]
    assert elsewhere.run(pushed, folder, repo).startswith(elsewhere.hub.url)
    assert elsewhere.files(repo) == before


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "POST", "part": "/preupload/", "status": 429, "headers": {"Retry-After": "1"}},
        {"method": "PUT", "part": "/_lfs/", "status": 500},
        pytest.param({"method": "PUT", "part": "/_lfs/", "cut": True}, marks=OLD_HUB),
    ],
    ids=lambda v: " ".join(map(str, v.values())),
)
def test_passing_failures_are_retried(elsewhere, folder, fault):
    repo = f"me/retried-{abs(hash(str(fault)))}"
    elsewhere.hub.fail(**fault)
    assert elsewhere.run(pushed, folder, repo).startswith(elsewhere.hub.url)
    assert elsewhere.files(repo) == published(folder) and elsewhere.hub.faults[0]["times"] == 0


def test_what_arrived_is_not_sent_again(elsewhere, folder):
    elsewhere.hub.fail("POST", "/me/broken/commit/", status=500)
    assert "not published" in elsewhere.run(pushed, folder, "me/broken")
    start = len(elsewhere.hub.log)
    elsewhere.run(pushed, folder, "me/broken")
    assert not [path for method, path in elsewhere.hub.log[start:] if method == "PUT"]
    assert elsewhere.files("me/broken") == published(folder)


# --- round trips


def train_and_push(folder, repo, **options):
    trainer = trained(folder, **options)
    trainer.push_to_hub(model_name=repo.split("/")[1], license="mit", dataset="me/rows")
    return logits(trainer.model), trainer.evaluate()


def load_and_run(repo, **options):
    from transformers import AutoModelForCausalLM

    try:
        return logits(AutoModelForCausalLM.from_pretrained(repo, **options))
    except ValueError as error:
        return str(error)


def test_a_trainer_pushes_every_save_and_the_card_is_true(elsewhere, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "me/trained", "hub_strategy": "every_save"}
    sent, metrics = elsewhere.run(
        train_and_push, tmp_path, "me/trained", save_strategy="steps", save_steps=1, **options
    )
    card = elsewhere.files("me/trained")["README.md"].decode()
    back, kind = elsewhere.run(logits_by, card)
    assert kind == "LlamaForCausalLM" and '"me/trained"' in card
    torch.testing.assert_close(back, sent)
    summaries = [summary for _, summary, _ in elsewhere.hub.repos["models/me/trained"].commits]
    assert summaries == [*(f"Training in progress, step {i}" for i in (1, 2, 3)), "End of training"]
    files = elsewhere.files("me/trained")
    assert {"README.md", "model.safetensors", "loss.png"} <= files.keys()
    assert not [name for name in files if name.startswith("checkpoint-")]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "README.md").write_bytes(files["README.md"])
    card = hub.validate(tmp_path / "again")
    shown = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert shown["loss"] == pytest.approx(metrics["eval_loss"]) and card.data.model_name == "trained"


def push_adapter(folder, base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(start, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trainer = trained(folder, model, hub_model_id="me/adapter")
    trainer.push_to_hub(license="mit")
    return logits(trainer.model)


def test_adapters_make_the_round_trip_with_their_base(elsewhere, tmp_path):
    elsewhere.run(train_and_push, tmp_path / "base", "me/base", hub_model_id="me/base")
    sent = elsewhere.run(push_adapter, tmp_path / "adapter", "me/base")
    files = elsewhere.files("me/adapter")
    back, kind = elsewhere.run(logits_by, files["README.md"].decode())
    assert kind == "PeftModelForCausalLM"
    torch.testing.assert_close(back, sent)
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert head["library_name"] == "peft" and head["base_model"] == "me/base" and "lora" in head["tags"]


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out
"""


def push_custom(folder, repo):
    folder.mkdir(parents=True)
    (folder / "modeling_odd.py").write_text(CUSTOM)
    sys.path.insert(0, str(folder))
    module = importlib.import_module("modeling_odd")
    module.OddConfig.register_for_auto_class()
    module.OddForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(0)
    model = module.OddForCausalLM(module.OddConfig(**tiny().config.to_diff_dict() | {"model_type": "odd"}))
    model.save_pretrained(folder / "out")
    (folder / "out" / "README.md").write_text(HEAD)
    return logits(model), hub.push(folder / "out", repo)


def test_a_class_of_its_own_loads_with_trust_and_a_pinned_revision(elsewhere, tmp_path):
    sent, address = elsewhere.run(push_custom, tmp_path / "odd", "me/odd")
    assert "modeling_odd.py" in elsewhere.files("me/odd")
    sha = address.rsplit("/", 1)[1]
    torch.testing.assert_close(elsewhere.run(load_and_run, "me/odd", trust_remote_code=True, revision=sha), sent)
    assert "trust_remote_code" in elsewhere.run(load_and_run, "me/odd", trust_remote_code=False)


def push_sampler(way, folder, repo):
    return hub.push(importlib.import_module(f"hf_xent.generation.{way}").export(folder), repo)


def sample(way, repo, card, **options):
    model = tiny()
    options |= {"max_new_tokens": 8, "pad_token_id": 0}
    torch.manual_seed(5)
    theirs = model.generate(IDS, custom_generate=repo, trust_remote_code=True, **options)
    torch.manual_seed(5)
    ours = importlib.import_module(f"hf_xent.generation.{way}").generate(model, IDS, **options)
    mask = torch.ones_like(IDS)
    model.generation_config.update(max_length=None, eos_token_id=None, pad_token_id=0)
    shown = usage_on(card.replace("200", "8"), model=model, inputs={"input_ids": IDS, "attention_mask": mask})["ids"]
    return theirs, ours, shown.shape[1]


@pytest.mark.parametrize(("way", "options"), [("mirostat", {"target": 1.5}), ("paths", {"paths": 3, "top_p": 0.8})])
def test_a_way_to_generate_makes_the_round_trip(elsewhere, tmp_path, way, options):
    elsewhere.run(push_sampler, way, tmp_path / way, f"me/{way}")
    assert {"custom_generate/generate.py", "custom_generate/decoding.py"} < {*elsewhere.files(f"me/{way}")}
    card = elsewhere.files(f"me/{way}")["README.md"].decode()
    theirs, ours, length = elsewhere.run(sample, way, f"me/{way}", card, **options)
    assert torch.equal(theirs, ours) and theirs.shape[1] > IDS.shape[1]
    assert f'custom_generate="me/{way}"' in card and length == IDS.shape[1] + 8


def push_rows(path):
    arguments = ("data", "push", "patentmia", "--repo-id", "me/patents", "--path", path, "--json")
    return json.loads(CliRunner().invoke(cli.app, list(map(str, arguments))).stdout)["address"]


def load_rows(card):
    found = usage_on(card)["parts"]
    return {name: part.to_list() for name, part in found.items()}, found["train"].features


def test_a_dataset_makes_the_round_trip(elsewhere, tmp_path):
    made = [{"text": f"发明 {i}", "label": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    assert elsewhere.run(push_rows, tmp_path / "rows.jsonl").startswith(f"{elsewhere.hub.url}/")
    back, features = elsewhere.run(load_rows, elsewhere.files("me/patents", "datasets")["README.md"].decode())
    assert [(row["text"], row["label"]) for row in back["train"]] == [(row["text"], row["label"]) for row in made]
    assert features["label"].names == ["non-member", "member"]
    assert elsewhere.hub.repos["datasets/me/patents"].private
    assert b"do not pass rows on" in elsewhere.files("me/patents", "datasets")["README.md"]


def push_preferences(folder):
    from trl import DPOConfig, DPOTrainer

    class Preferring(hub.Carded, DPOTrainer):
        """As every trainer of ours on TRL."""

    words = [{"prompt": "the", "chosen": " quick brown fox", "rejected": " lazy dog"}] * 4
    options = config(
        folder, DPOConfig, max_steps=2, bf16=False, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_model_id="me/preferring", hub_strategy="every_save",
    )  # fmt: skip
    trainer = Preferring(
        tiny(std=0.05),
        tiny(std=0.05),
        args=options,
        train_dataset=datasets.Dataset.from_list(words),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="me/words")
    return logits(trainer.model)


@pytest.mark.slow  # TRL takes seconds to import
def test_trainers_on_trl_push_our_card(elsewhere, tmp_path):
    sent = elsewhere.run(push_preferences, tmp_path)
    card = elsewhere.files("me/preferring")["README.md"].decode()
    torch.testing.assert_close(elsewhere.run(logits_by, card)[0], sent)
    head = yaml.safe_load(elsewhere.files("me/preferring")["README.md"].decode().split("---")[1])
    assert "licence" not in head and head["library_name"] == "transformers" and head["datasets"] == ["me/words"]
    assert head["tags"][0] == "hf_xent" and "dpo" in head["tags"]  # TRL's own stay
    assert b"| `beta` | 0.1 |" in elsewhere.files("me/preferring")["README.md"]


# --- models without norms


def removed(name):
    """A model whose norms were all removed after it saw a batch."""
    model = ln_free.wrap(tiny(name))
    ln_free.calibrate(model, [{"input_ids": IDS}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    return model


FORMS = {"removable": lambda model: model, "eps": ln_free.to_eps_trick, "true": ln_free.to_true}


@pytest.fixture(scope="module")
def published_forms(elsewhere, tmp_path_factory):
    """Repository -> logits before it was pushed, of two architectures in every form."""
    found = {}
    for name in ("gpt2", "llama"):
        for form, convert in FORMS.items():
            repo, model = f"me/{name}-{form}", convert(removed(name))
            folder = ln_free.save(model, tiny_tokenizer(), tmp_path_factory.mktemp(form))
            code, told = elsewhere.run(publish, folder, "--repo-id", repo, "--license", "mit")
            assert code == 0, told
            found[repo] = logits(model)
    return found


def load_by(card):
    found = usage_on(card)
    text = found["tokenizer"].decode(found["tokenizer"]("the fox")["input_ids"])
    return logits(found["model"]), ln_free.is_ln_free(found["model"]), ln_free.form_of(found["model"]), text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_code_on_its_card_loads_a_model_without_norms(elsewhere, published_forms, name, form):
    repo = f"me/{name}-{form}"
    card = elsewhere.files(repo)["README.md"].decode()
    back, without_norms, kind, text = elsewhere.run(load_by, card)
    assert_same(back, published_forms[repo])
    assert without_norms and kind.startswith(form) and text == " the fox"
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == ("hf_xent" if form == "removable" else "transformers") and "ln-free" in head["tags"]


ALONE = """
import json, sys
sys.modules["hf_xent"] = None  # an import of it is an error
import torch
from transformers import AutoModelForCausalLM
cards, ids, results = json.load(sys.stdin), torch.arange(3, 19).reshape(2, 8), {}
for repo, code in cards.items():
    names = {}
    exec(code, names)
    with torch.no_grad():
        results[repo] = names["model"](input_ids=ids).logits
    if repo.endswith("true"):
        norms = [type(module).__name__ for module in names["model"].modules() if "Norm" in type(module).__name__]
        assert not norms, norms
        try:
            AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("loaded by a stock class, with fresh norms")
torch.save(results, sys.argv[1])
"""


def test_stock_forms_load_without_hf_xent(elsewhere, published_forms, tmp_path):
    """In a fresh process that cannot import it; and what a stock class would take for its own is refused."""
    stock = [repo for repo in published_forms if not repo.endswith("removable")]
    cards = {repo: elsewhere.files(repo)["README.md"].decode() for repo in stock}
    codes = {repo: re.search(r"```python\n(.*?)```", card, re.DOTALL)[1] for repo, card in cards.items()}
    where = {
        "HF_ENDPOINT": elsewhere.hub.url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "logits.pt")],
        input=json.dumps(codes), env=os.environ | where, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for repo, back in torch.load(tmp_path / "logits.pt").items():
        assert_same(back, published_forms[repo])


def push_removal(folder, repo, **options):
    settings = config(folder, LNRemovalConfig, **options, hub_model_id=repo)
    model, found = tiny("gpt2", std=0.1), datasets.Dataset.from_list(rows())
    trainer = LNRemovalTrainer(model, settings, train_dataset=found, processing_class=tiny_tokenizer())
    trainer.train()
    trainer.push_to_hub(license="mit")
    return logits(trainer.model)


@pytest.mark.parametrize(("steps", "left"), [(12, 0), (2, 0), (1, 7)])
def test_what_removal_pushes_is_what_its_card_loads(elsewhere, tmp_path, steps, left):
    repo = f"me/removal-{steps}"
    sent = elsewhere.run(push_removal, tmp_path, repo, max_steps=steps)
    card = elsewhere.files(repo)["README.md"].decode()
    back, without_norms, form, _ = elsewhere.run(load_by, card)
    assert_same(back, sent)
    assert without_norms == (left == 0) and form == "removable"
    assert ("7 of 7 norms are not removed yet" in card) == (left == 7) and "a stock class (`AutoModel...`)" in card
    assert "| `sigma_weight` | 0.1 |" in card, "it is the card of the training"


def test_cards_of_folders_load_the_folder(tmp_path, monkeypatch):
    """Before anything is published: what a trainer saved, and the same model in the other forms."""
    model, found = tiny("gpt2", std=0.1), datasets.Dataset.from_list(rows())
    trainer = LNRemovalTrainer(model, config(tmp_path / "out", LNRemovalConfig, max_steps=4), train_dataset=found)
    trainer.train()
    trainer.save_model(tmp_path / "removable")
    (tmp_path / "removable" / "README.md").write_text((tmp_path / "removable" / "README.md").read_text() + "\nMine.")
    trainer.save_model(tmp_path / "removable")
    assert (tmp_path / "removable" / "README.md").read_text().endswith("Mine.")
    assert not (tmp_path / "out" / "README.md").exists()
    for form in ("eps", "true"):
        ln_free.save(FORMS[form](trainer.model), None, tmp_path / form)
    for form in FORMS:
        monkeypatch.chdir(tmp_path / form)
        names = usage_on(Path("README.md").read_text())
        assert ln_free.is_ln_free(names["model"]) and names.get("tokenizer") is None
        reference = trainer.model if form == "removable" else FORMS[form](trainer.model)
        assert_same(logits(names["model"]), logits(reference))


def test_cards_of_models_without_norms_tell_where_they_come_from(tmp_path):
    (tmp_path / "trained").mkdir()
    extra = "base_model: me/base\ndatasets:\n- me/rows\nlanguage: en\ntags:"
    (tmp_path / "trained" / "README.md").write_text(HEAD.replace("tags:", extra))
    removed("gpt2").save_pretrained(tmp_path / "trained")
    model, _ = ln_free.load(str(tmp_path / "trained"))
    report = ln_free.Report({"LN-free": ln_free.analyze(model, IDS)})
    ln_free.save(ln_free.to_true(model), tiny_tokenizer(), tmp_path / "true", report)
    card = hub.validate(tmp_path / "true")
    assert (card.data.license, card.data.base_model, card.data.language) == ("mit", "me/base", "en")
    assert card.data.datasets == ["me/rows"] and str(tmp_path) not in card.text
    assert "| loss, mean (nats per token) |" in card.text and (tmp_path / "true" / "report.png").exists()
    with pytest.raises(ValueError, match="license is 'unknown': say which"):
        hub.validate(ln_free.save(removed("llama"), None, tmp_path / "unknown"))
    half = removed("gpt2")
    ln_free.restore(half, "v.1")
    for faulty, match in ((half, "1 norms are left in it, v.1 first"), (tiny("gpt2"), "its form is normalized")):
        with pytest.raises(ValueError, match=match):
            ln_free.save(faulty, None, tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- how models are loaded


def sequence_model(kind, configuration, **sizes):
    config = configuration(**{"vocab_size": V, "pad_token_id": 0, "decoder_start_token_id": 0, **sizes})
    torch.manual_seed(0)
    return kind(config).eval()


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPES = {
    "causal": ("text-generation", lambda: tiny("gpt2")),
    "classes": (
        "text-classification",
        lambda: sequence_model(transformers.LlamaForSequenceClassification, transformers.LlamaConfig, **SMALL),
    ),
    "seq2seq": (
        "text2text-generation",
        lambda: sequence_model(
            transformers.T5ForConditionalGeneration, transformers.T5Config, d_model=16, num_layers=1, num_heads=2
        ),
    ),
    "masked": (
        "fill-mask",
        lambda: sequence_model(transformers.BertForMaskedLM, transformers.BertConfig, **SMALL),
    ),
    "odd": (
        None,
        lambda: sequence_model(transformers.BertForNextSentencePrediction, transformers.BertConfig, **SMALL),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_code_for_a_class_loads_that_class(tmp_path, monkeypatch, shape):
    task, make = SHAPES[shape]
    model = make()
    model.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = hub.usage_of(model)
    back = usage_on(found.section())["model"]
    assert type(back) is type(model) and found.task == task
    for name, p in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], p), name


def test_a_fine_tuned_model_without_norms_is_loaded_with_its_code(tmp_path):
    """Its class is made on the spot, and one of its bases is a stock class, which would put norms in."""
    found = hub.usage_of(ln_free.to_true(removed("gpt2")))
    assert 'AutoModelForCausalLM.from_pretrained("PLACE", trust_remote_code=True)' in found.code
    assert hub.usage_of(torch.nn.Linear(2, 2)) is None


def test_a_name_without_user_is_the_users(elsewhere, tmp_path):
    (tmp_path / "README.md").write_text(f'{HEAD}\n<!-- loads . -->\n```python\na, b = ".", "./x"\n```\n`"."`\n')
    assert elsewhere.run(pushed, tmp_path, "bare").startswith(elsewhere.hub.url)
    assert '\na, b = "me/bare", "./x"\n```\n`"."`\n' in elsewhere.files("me/bare")["README.md"].decode()
    elsewhere.run(pushed, tmp_path, "me/other")
    assert b'a, b = "me/other"' in elsewhere.files("me/other")["README.md"]
    assert b'a, b = "me/bare"' in elsewhere.files("me/bare")["README.md"]


# --- the command


def publish(*arguments):
    result = CliRunner().invoke(cli.app, ["publish", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return 1, str(result.exception)
    return result.exit_code, result.stdout


def test_dry_run_shows_the_card_and_sends_nothing(folder):
    code, shown = publish(folder, "--repo-id", "me/dry", "--dry-run")  # a connection would be an error here
    assert code == 0 and "nothing was sent" in shown and "model.safetensors" in shown and "1,000" in shown
    assert "optimizer.pt" not in shown
    found = json.loads(publish(folder, "--repo-id", "me/dry", "--dry-run", "--json")[1])
    assert found["address"] is None and set(found["files"]) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "odd [1].txt",
    }


def test_publish_sets_the_license_and_says_where(elsewhere, folder):
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("mit", "unknown"))
    code, told = elsewhere.run(publish, folder, "--repo-id", "me/told")
    assert code == 1 and "say which it is" in told and "models/me/told" not in elsewhere.hub.repos
    code, told = elsewhere.run(publish, folder, "--repo-id", "me/told", "--license", "mit", "--json")
    assert code == 0 and json.loads(told)["address"].startswith(elsewhere.hub.url)
    assert (
        elsewhere.files("me/told") == published(folder) and b"license: mit" in elsewhere.files("me/told")["README.md"]
    )
    code, told = elsewhere.run(publish, folder, "--repo-id", "me/told", "--type", "space")
    assert code == 1 and "choose model or dataset" in told
