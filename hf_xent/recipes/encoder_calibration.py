"""Train a head that hardens a frozen encoder.

Data: a column 'text' or 'image' with a 'label', or a folder with a folder of pictures for each class.
Example: hf-xent encoder-calibration --model_name_or_path my/clip --dataset_name my_pictures/ --class_template "a {}"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .base import Recipe, Setup, split_rows
from .labeled import LabeledArguments, padded_by, tokens_of


@dataclass
class EncoderArguments(LabeledArguments):
    """Where the labeled rows come from, and what stands for a class."""

    class_template: str | None = field(
        default=None,
        metadata={
            "help": "A text with {} for the name of a class, whose features stand for the class: 'a photo of a {}.';"
            " default: the mean of the features of its rows."
        },
    )
    scale: float | None = field(
        default=None, metadata={"help": "What cosines are multiplied by; default: the model's own scale, or 100."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_template is not None and "{}" not in self.class_template:
            raise ValueError(f"class_template is {self.class_template!r}: write {{}} where the name of a class belongs")


class EncoderCalibration(Recipe):
    """`EncoderCalibrationTrainer` from the command line."""

    trainer, config = "EncoderCalibrationTrainer", "encoder_calibration:EncoderCalibrationConfig"
    arguments = EncoderArguments

    def check(self, setup: Setup) -> None:
        """Raises: ValueError for adapters, since the encoder is frozen."""
        if setup.model.use_peft:
            raise ValueError(
                "use_peft is True, but the encoder is frozen and a head behind it is trained: leave it out"
            )

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """The encoder, and what reads its inputs: a tokenizer, an image processor, or both."""
        from transformers import AutoModel, AutoProcessor

        from ..models.loading import explain_load_errors
        from .models import load, refuse_idle_adapters

        refuse_idle_adapters(setup.model)
        model = load(AutoModel, setup.model).eval()
        with explain_load_errors(setup.model.model_name_or_path) as source:
            processor = AutoProcessor.from_pretrained(source)
        tokenizer = _tokenizer(processor)
        if tokenizer is not None:
            padded_by(model, tokenizer)
        return model.to(setup.config.device), processor

    def make(self, setup: Setup) -> Any:
        """The trainer of a head behind the encoder."""
        from ..models.zero_shot import ZeroShot
        from ..trainers import EncoderCalibrationTrainer

        setup.phase("loading the model")
        encoder, processor = self.model(setup)
        setup.phase("reading the data")
        data: EncoderArguments = setup.data
        labeled = data.labeled(data.source, data.dataset_train_split, "auto")
        names = _names(labeled)
        is_image = labeled.columns.task == "image"
        reader = getattr(processor, "image_processor", processor) if is_image else _tokenizer(processor)
        if reader is None or labeled.columns.task not in ("text", "image"):
            raise ValueError(
                f"dataset_name is {data.dataset_name!r}, rows of {labeled.columns.task}, which"
                f" {setup.model.model_name_or_path} does not read: choose texts, or pictures"
            )

        def read(source: str, split: str | None) -> Any:
            found = labeled if split == data.dataset_train_split else data.labeled(source, split, "auto")
            ids = _ids(found, names, source)
            return (
                _pixels(found, ids, reader) if is_image else tokens_of(found.rows, reader, data.max_length, labels=ids)
            )

        train, test = split_rows(data, read, setup.config.seed)
        setup.phase("finding the classes")
        centers = _centers(encoder, train, names, data.class_template, _tokenizer(processor), reader)
        model = ZeroShot(encoder, centers, scale=data.scale)
        return EncoderCalibrationTrainer(
            model, setup.config, train_dataset=train, eval_dataset=test, processing_class=reader
        )


def _tokenizer(processor: Any) -> Any:
    """The tokenizer of a processor, or the processor itself if it is one."""
    return processor if hasattr(processor, "pad_token") else getattr(processor, "tokenizer", None)


def _names(labeled: Any) -> list[str]:
    """The classes in their order."""
    if labeled.names:
        return list(labeled.names)
    known = {label for label in labeled.labels if label is not None}
    numbers = all(isinstance(label, int | float) for label in known)
    return [str(label) for label in (sorted(known) if numbers else sorted(map(str, known)))]


def _ids(labeled: Any, names: list[str], source: str) -> list[int]:
    """The number of each row's class. Raises: ValueError for a class that the rows to train on do not have."""
    known = {name: i for i, name in enumerate(names)}
    if unknown := [label for label in labeled.labels if str(label) not in known]:
        raise ValueError(f"{source} has the label {unknown[0]!r}, but the classes are {', '.join(names)}: correct it")
    return [known[str(label)] for label in labeled.labels]


def _pixels(labeled: Any, ids: list[int], processor: Any) -> Any:
    """Pictures as the encoder reads them, with the numbers of their classes."""
    mode = "L" if len(getattr(processor, "image_mean", None) or [0, 0, 0]) == 1 else "RGB"

    def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"pixel_values": processor([image.convert(mode) for image in batch["image"]])["pixel_values"]}

    rows = labeled.rows.map(
        read, batched=True, batch_size=64, remove_columns=labeled.rows.column_names, desc="pictures"
    )
    return rows.add_column("labels", ids)


def _centers(encoder: Any, train: Any, names: list[str], template: str | None, tokenizer: Any, reader: Any) -> Any:
    """A vector for each class: of its name in a text, or the mean of the features of its rows."""
    import torch
    from transformers import default_data_collator

    from ..models.embeddings import class_texts, features, prototypes

    if template is not None:
        if tokenizer is None:
            raise ValueError(f"class_template is {template!r}, but the model has no tokenizer: leave it out")
        return class_texts(encoder, tokenizer, names, [template])
    found = []
    with torch.no_grad():
        for start in range(0, len(train), 32):
            rows = [train[i] for i in range(start, min(start + 32, len(train)))]
            inputs = [{name: row[name] for name in row if name != "labels"} for row in rows]
            batch = (
                default_data_collator(inputs)
                if "pixel_values" in inputs[0]
                else reader.pad(inputs, return_tensors="pt")
            )
            found.append(features(encoder, {name: x.to(encoder.device) for name, x in batch.items()}))
    return prototypes(torch.cat(found), torch.tensor(train["labels"][:], device=encoder.device), len(names))
