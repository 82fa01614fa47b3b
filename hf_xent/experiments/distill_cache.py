"""A cache of a teacher's answers as data, and how it is written: `write(Caching("smollm2", "texts/"))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .documents import load_documents
from .fields import option

if TYPE_CHECKING:
    from ..teachers.forms import Form
    from ..teachers.writing import Written


@dataclass(frozen=True)
class Caching:
    """All settings of a cache; each field is an option of `hf-xent distill cache`."""

    teacher: str = option(
        "The teacher: 'smollm2' (packaged), a path or Hub id of a causal LM, or a server's http(s) URL.", "smollm2"
    )
    dataset: str = "pydoc"  # any source of `hf_xent.data.load_text`
    kind: str = option(
        "'hidden' for hidden states, all of the distribution; 'top_k' for the most probable tokens.", "top_k"
    )
    k: int | None = option("How many tokens top_k keeps at each position [default: 64].", None, min=1, max=1024)
    dtype: str = option("Of what is stored: float16, float32, or int8 for hidden states.", "float16")
    temperature: float = option("T of the softmax whose log-probabilities top_k keeps.", 1.0)
    output: str = option("Folder of the cache; a part of the same one is completed.", "out/cache")
    column: str = "text"  # the column that holds the text
    split: str | None = None  # of the data set, such as 'train[:10%]'
    max_length: int = option("Tokens that are kept of a document, from its start.", 1024, min=2)
    tokenizer: str | None = option("Path or Hub id of the tokenizer [default: the teacher's].", None)
    teacher_dtype: str = option("Dtype in which the teacher is loaded: float32, bfloat16, float16, or auto.", "auto")
    batch_rows: int = option("Documents in a forward pass.", 8, min=1)
    shard_rows: int = option("Documents in a file.", 256, min=1)
    model: str | None = option("The name of a server's model [default: the only one].", None)
    concurrency: int | None = option("How many requests a server gets at a time [default: 4].", None, min=1)

    @property
    def is_server(self) -> bool:
        """Whether the teacher is behind an address."""
        return self.teacher.startswith(("http://", "https://"))


def write(
    run: Caching, report: Callable[[int, int], None] | None = None, note: Callable[[str], None] | None = None
) -> Written:
    """Write a cache with its card, or what it lacks.

    Args:
        run: The settings.
        report: Called with the number of tokens that are done and of all.
        note: Called with a line on what is to be written, before it is.

    Returns:
        What was written.

    Raises:
        ValueError: The teacher, the data or an option cannot be used, or the folder holds something else.
        RuntimeError: A server does not answer; what is written stays.
    """
    from .. import hub
    from ..teachers import write_cache
    from ..teachers.forms import Form

    form = Form(run.kind, run.k, run.dtype, run.temperature)  # before anything is loaded
    if run.is_server and run.tokenizer is None:
        raise ValueError("tokenizer is not given: name that of the server's model, which a server does not tell")
    if run.is_server and (form.kind, form.temperature) != ("top_k", 1):
        raise ValueError(
            "a server gives the most probable tokens at temperature 1: choose kind top_k and temperature 1"
        )
    teacher, tokenizer, dataset = _loaded(run)
    if note is not None:
        note(_estimate(form, teacher, dataset, run.output))
    found = write_cache(
        teacher,
        dataset,
        run.output,
        tokenizer=tokenizer,
        source=Path(run.dataset).name if Path(run.dataset).exists() else run.dataset,
        progress=report,
        **asdict(form),
        shard_rows=run.shard_rows,
        batch_rows=run.batch_rows,
    )
    (Path(run.output) / "README.md").write_text(card(found, hub.render), encoding="utf-8")
    return found


def _estimate(form: Form, teacher: Any, dataset: Any, output: str) -> str:
    """How much is to be written, in one line."""
    from ..patching import head_of

    features = head_of(teacher.model).in_features if form.kind == "hidden" else None
    tokens, each = sum(map(len, dataset["input_ids"])), form.bytes_per_token(features)
    return f"{tokens:,} tokens of {each} bytes, about {tokens * each / 1e6:,.1f} MB in {output}"


def _loaded(run: Caching) -> tuple[Any, Any, Any]:
    """The teacher, the tokenizer and the tokenized documents."""
    import torch

    from ..models import loading
    from ..models.quiet import quiet_loading
    from ..teachers import load
    from ..teachers.tokens import tokenized

    with quiet_loading():
        from transformers import AutoTokenizer

        with loading.explain_load_errors(run.tokenizer or run.teacher) as place:
            tokenizer = AutoTokenizer.from_pretrained(place)
        texts = load_documents(run.dataset, run.split, run.column)  # as training does
        dataset = tokenized(texts, tokenizer, column=run.column, max_length=run.max_length)
        options: dict[str, Any] = {"model": run.model, "concurrency": run.concurrency}
        if run.is_server:
            options |= {"k": 64 if run.k is None else run.k, "tokenizer": tokenizer}
        else:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            options |= {"dtype": run.teacher_dtype, "device": device}
        return load(run.teacher, **options), tokenizer, dataset


def card(found: Written, render: Callable[..., str]) -> str:
    """The card of a cache."""
    from datasets import Dataset, concatenate_datasets
    from huggingface_hub import DatasetCardData

    from ..hub.datasets import describe, size_of

    head = DatasetCardData(
        license="unknown",  # of what a teacher says: `hf-xent publish --license` writes it
        size_categories=size_of(found.cache.rows),
        task_categories=["text-generation"],
        pretty_name=f"What {found.cache.teacher} says about {found.cache.dataset or 'a data set'}",
        tags=["hf_xent", "distillation"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data-*.arrow"}]}],
    )
    documents = [Dataset.from_file(str(shard)) for shard in found.cache.shards(found.folder)]
    describe(head, {"train": concatenate_datasets(documents)})
    columns = ["input_ids", *found.cache.form.columns]
    return render("cache", head, cache=found.cache, columns=columns, size=f"{found.bytes_per_token:.1f}")
