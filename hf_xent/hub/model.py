"""The card of a trained model, from the state of its trainer: one mixin, for which a trainer needs no code.

    class XentTrainer(Carded, Trainer): ...

    numbers    the last evaluation and the curve of the loss, both from `state.log_history`
    method     the docstring of the trainer's file, and of the loss's, with their formulas and sources
    settings   the configuration's fields: those of the method, and those of transformers that are not at their default

The Hub reads an evaluation from two places: `model-index` in the front matter, for any metric, and, for benchmarks, an
entry in `.eval_results/` (`hf_xent.hub.results`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..classes.base import ClassLoss
from ..losses.base import Loss
from ..system import figures
from ..system.machine import cpu_name
from .cards import known, render
from .results import latest, rows, write_benchmarks
from .usage import HERE, usage_of, with_tokenizer

LIBRARIES = ("hf-xent", "torch", "transformers", "trl", "peft", "datasets")
PRIVATE = re.compile(
    r"hub_|push_to|.*(_dir|token|name)$|report_to|disable_tqdm|logging_|save_|_n_gpu|use_cpu|debug$|dataloader_pin|run_id"
)
"""Settings of transformers that do not affect the result, or are private."""


PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
MAIN = {"beta", "loss_type", "max_length"}
"""Settings of TRL that are shown at their default too."""
KEYWORDS = (
    "dataset", "tags", "license", "language", "tasks", "finetuned_from", "benchmarks", "dataset_tags", "dataset_args",
)  # fmt: skip


class Carded:
    """Goes before a trainer in a class's bases: `push_to_hub` and `create_model_card` write the card of hf_xent.

    Both take the keywords of transformers and TRL. The base model and its license are looked up if they are not passed;
    the dataset is not, as rows do not have their origin.
    """

    objective: Any = None
    """The loss, for trainers that have one of the registry."""

    @property
    def card_facts(self) -> Mapping[str, str]:
        """What the settings do not tell, such as a teacher: a title and a line each."""
        return {}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, **metadata: Any
    ) -> None:
        """Writes README.md, loss.png and, for benchmarks, `.eval_results/` into the output folder.

        Args:
            model_name: The title; None for the name of the folder.
            dataset_name: The data set of the training; like the keyword `dataset`, one Hub id or several.
            **metadata: `dataset`, `tags`, `license`, `language`, `tasks`, `finetuned_from`; `dataset_tags` names a
                dataset too, and `dataset_args`, a keyword of transformers, is not shown. `benchmarks` tells which
                metrics are results of a benchmark with a data set on the Hub: {'accuracy': 'user/dataset:task'}.

        Raises:
            TypeError: For keywords that no card takes.
            ValueError: For a benchmark's metric that was not measured.
        """
        trainer: Any = self
        if unknown := metadata.keys() - set(KEYWORDS):
            raise TypeError(f"create_model_card takes no {', '.join(unknown)}: its keywords are {', '.join(KEYWORDS)}")
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.args.output_dir)
        metadata = {"dataset": dataset_name or metadata.get("dataset_tags"), **metadata}
        write_card(trainer, folder, model_name or folder.name, metadata)


class Tokenless:
    """Goes before a trainer's configuration in a class's bases: its copies and pickles do not hold the Hub's token.

    Trainers push such a pickle with the model, `training_args.bin`.
    """

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, without the value of `hub_token`: a copy pushes with the user's login."""
        return {**self.__dict__, "hub_token": None}


def write_card(trainer: Any, folder: Path, name: str, metadata: dict[str, Any] | None = None) -> None:
    """Writes the card of a trainer, the plot of its loss and its `.eval_results/`.

    Args:
        trainer: A trainer of transformers.
        folder: The folder to write; it is made if it does not exist.
        name: The title.
        metadata: The keywords of `Carded.create_model_card`.
    """
    metadata = metadata or {}
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = getattr(model, "peft_config", None)  # set in models of PEFT
    base = metadata.get("finetuned_from") or _base(model.config._name_or_path)
    results = latest(trainer.state.log_history)
    # without local paths, such as that of 'brown:FOLDER'
    datasets = [name for name in _as_list(metadata.get("dataset")) if not Path(name.partition(":")[2] or name).exists()]
    use = usage_of(model)
    tasks = [*_as_list(metadata.get("tasks")), *filter(None, [use and use.task])]
    task = tasks[0] if tasks else "text-generation" if model.can_generate() else "text-classification"
    library = use.library if use else "peft" if adapter else "transformers"
    if use and hasattr(trainer.processing_class, "decode"):  # it is saved with the model
        use = with_tokenizer(use)
    about = {**metadata, "base": base, "datasets": datasets, "task": task, "adapter": adapter, "library": library}
    method, loss = _docs(type(trainer)), _loss(trainer.objective)
    text = render(
        "model",
        _head(trainer, name, about, results),
        name=name,
        kind=_kind(model),
        use=use.section(trainer.hub_model_id or HERE) if use else "",
        base=base,
        adapter=bool(adapter),
        datasets=[f"[{name}](https://huggingface.co/datasets/{name})" if _is_id(name) else name for name in datasets],
        trainer=type(trainer).__name__,
        steps=trainer.state.global_step,
        results=rows(trainer.state.log_history),
        method=_linked(method),
        loss=loss and (loss[0], _linked(loss[1])),
        settings=[row for row in settings(trainer.args) if loss is None or row[0] != "loss"],  # it has its section
        facts=trainer.card_facts,
        hardware=hardware(trainer.args.device),
        versions=_versions(),
        plot=_plot(trainer.state.log_history, folder / "loss.png"),
        papers=_papers(method, loss[1] if loss else ""),
    )
    notes = f"{name}, step {trainer.state.global_step}, evaluated by its training run"
    write_benchmarks(folder, metadata.get("benchmarks") or {}, results, notes)
    (folder / "README.md").write_text(text, encoding="utf-8")


def origin(place: str) -> dict[str, Any]:
    """The origin of a model, according to its card.

    Args:
        place: The folder or repository from which the model was loaded.

    Returns:
        `base_model`, `license`, `language` and `datasets`, each None if it is not known.
    """
    card = known(place)
    base = card.get("base_model") if Path(place).exists() else place or None
    license = card.get("license") or known(base if isinstance(base, str) else None).get("license")
    return {**{key: card.get(key) for key in ("language", "datasets")}, "base_model": base, "license": license}


def settings(args: Any) -> list[tuple[str, Any, str]]:
    """(name, value, meaning) of the method's fields, then of the others that are not at their default."""
    from transformers import TrainingArguments

    common = {field.name for field in fields(TrainingArguments)}
    of_method = [f for f in fields(args) if f.name not in common | _of_trl(args)]
    changed = [f for f in fields(TrainingArguments) if getattr(args, f.name) != _default(f)]
    shown = [f for f in of_method + changed if not PRIVATE.match(f.name) and not _help(f).startswith("Deprecated")]
    rows = [(f.name, getattr(args, f.name), _help(f)) for f in shown]
    rows = [(name, value.value if isinstance(value, Enum) else value, text) for name, value, text in rows]
    return [row for row in rows if isinstance(row[1], int | float | str | list | None) and not _is_path(row[1])]


def _of_trl(args: Any) -> set[str]:
    """The fields of TRL's that a configuration of ours left at their default; without the main ones."""
    if type(args).__module__.startswith("trl."):
        return set()
    theirs = {f.name for cls in type(args).__mro__ if cls.__module__.startswith("trl.") for f in fields(cls)}
    return {f.name for f in fields(args) if f.name in theirs - MAIN and getattr(args, f.name) == _default(f)}


def hardware(device: Any) -> str:
    """The accelerator's name, or the processor's."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {cpu_name()}"


def _head(trainer: Any, name: str, about: dict[str, Any], results: dict[str, float]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    tags = ["hf_xent", _method(trainer), *_as_list(about.get("tags")), *(["lora"] if about["adapter"] else [])]
    source = next(filter(_is_id, about["datasets"]), None)
    rows = f"evaluation rows of the run{f', {source}' if source else ''}"
    evaluation = [EvalResult(about["task"], source or "custom", rows, metric, x) for metric, x in results.items()]
    return ModelCardData(
        license=about.get("license") or known(about["base"]).get("license") or "unknown",
        language=about.get("language"),
        library_name=about["library"],
        pipeline_tag=about["task"],
        base_model=about["base"],
        datasets=[dataset for dataset in about["datasets"] if _is_id(dataset)] or None,
        tags=sorted(set(tags), key=tags.index),
        model_name=name if evaluation else None,
        eval_results=evaluation or None,
    )


def _loss(objective: Any) -> tuple[dict[str, Any], str] | None:
    """The fields of a loss of a registry and the docstring of its file; None for another loss."""
    known = isinstance(objective, Loss | ClassLoss)
    return (objective.describe(), _docs(type(objective))) if known else None


def _docs(cls: type) -> str:
    return (sys.modules[cls.__module__].__doc__ or "").strip()


def _kind(model: Any) -> str:
    """The class of a model and its size; sharding derives a class of its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = sum(getattr(p, "ds_numel", p.numel()) for p in base.parameters())
    return f"{type(base).__name__.removeprefix('FSDP')} with {count:,} parameters"


def _linked(docs: str) -> str:
    """Text with links to the papers that it names."""
    return PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", docs)


def _papers(*docs: str) -> list[str]:
    """The papers that the method and the loss name as their source."""
    sources = [text.partition("Source:")[2] for text in docs]
    sources = [re.split(r"\n(?:Data|Relations|Statistics):", text)[0] for text in sources]
    return list(dict.fromkeys(found for text in sources for found in PAPER.findall(text)))


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            if library.replace("-", "_") in sys.modules:
                found[library] = version(library)
        except PackageNotFoundError:  # it runs from its sources
            continue
    return found


def _method(trainer: Any) -> str:
    return type(trainer).__module__.rsplit(".", 1)[-1].replace("_", "-")


def _base(name: str) -> str | None:
    """The Hub id of a model's origin; None if it is a local folder or not known."""
    return name if name and not Path(name).exists() else None


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_path(value: Any) -> bool:
    """Whether a value is an absolute path on this machine."""
    return isinstance(value, str) and Path(value).is_absolute()


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _help(field: Field[Any]) -> str:
    return " ".join(field.metadata.get("help", "").split()).split(". ")[0].replace("|", "\\|")


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _plot(history: list[dict[str, Any]], path: Path) -> str | None:
    """Draws the curves of the loss; returns the file's name, or None if there are too few points."""
    curves = {k: [(e["step"], e[k]) for e in history if k in e] for k in ("loss", "eval_loss")}
    if len(curves["loss"]) < 2:
        return None
    figure, [axis] = figures.panels(1, 6, 3.2)
    for (name, points), style in zip(curves.items(), ("-", "o--"), strict=True):
        if points:
            axis.plot(*zip(*points, strict=True), style, label=name, color="#d1495b" if name == "loss" else "#30638e")
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(frameon=False)
    return figures.save(figure, path, dpi=120).name
