"""The geometry of a model's representations while it is trained: RankMe and alpha-ReQ of held-out documents.

    geometry = GeometryCallback(texts, layers=(-1,), max_length=128)
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[geometry])
    trainer.train()
    geometry.rows                                   # also in the trainer's log history, and in output_dir/geometry.csv

Measured are the model before the training, after every `every` steps or at steps 1, 2, 4, 8 ..., and at the end. The
formulas and what limits them are in `hf_xent.metrics.geometry`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..metrics.geometry import MEASURES, by_layer, warn_if_few
from ..models.features import Documents, check_layers
from ..options.ranges import check_count
from ..system.files import replace_atomically
from .whole import check_whole

PREFIX = "geometry_"
"""Before each name in the trainer's log history."""
COLUMNS = ("step", "tokens", "layer", "documents", *MEASURES)
DOUBLING = "doubling"


class GeometryCallback(TrainerCallback):
    """Measures the geometry of held-out documents as a model is trained; see the module's docstring.

    It runs on the main process, in evaluation mode, and changes neither the training nor its random numbers. `rows` has
    a dictionary for each step and layer: `step`, `tokens`, `layer`, `documents`, and the measures. Each is also an
    entry of the trainer's log history, with 'geometry_' before the names. The file is written from that history, so a
    resumed training goes on where its checkpoint was; a file of another training is moved to a name beside it. Tokens
    are those of `include_num_input_tokens_seen`, which is switched on while the model trains: without padding, if the
    trainer has a tokenizer that names it.

    Args:
        texts: Held-out documents: texts, lists of token ids, or `Documents`.
        every: Steps between two measurements, or 'doubling' for steps 1, 2, 4, 8 ...
        layers: Which hidden states: 0 is the embeddings, -1 the last layer.
        file: The CSV file; 'geometry.csv' in the trainer's output folder if it is left out.
        resamples: Resamples of the documents for standard deviations, NAME_sd of each measure; 0 for none.
        **reading: As for `hf_xent.models.features.Documents`: `tokenizer` (else the trainer's), `batch_size`,
            `max_length`.

    Raises:
        ValueError: Options out of range; when the training begins, a layer that the model does not have, too few
            documents or features, texts without a tokenizer, or weights that are split over processes.
    """

    def __init__(
        self,
        texts: Any,
        every: int | str = DOUBLING,
        layers: Sequence[int] = (-1,),
        *,
        file: str | Path | None = None,
        resamples: int = 0,
        **reading: Any,
    ):
        if isinstance(every, str):
            if every != DOUBLING:
                raise ValueError(f"every is {every!r}: choose a number of steps, or {DOUBLING!r}")
        else:
            check_count("every", every, 1)
        if resamples:
            check_count("resamples", resamples, 2)
        if isinstance(texts, Documents) and reading:
            raise ValueError(f"texts are Documents: set {', '.join(reading)} on them, not beside them")
        self.texts, self.every, self.layers, self.reading = texts, every, tuple(layers), reading
        self.file, self.resamples = file, resamples
        self.rows: list[dict[str, float]] = []
        self.documents: Documents | None = texts if isinstance(texts, Documents) else None
        self._tokens_counted: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model, unless the training is resumed; called by the trainer."""
        self._tokens_counted = args.include_num_input_tokens_seen  # on every process: the count is gathered
        if self._tokens_counted == "no":
            padding = getattr(kwargs.get("processing_class"), "pad_token_id", None)
            args.include_num_input_tokens_seen = "all" if padding is None else "non_padding"
        if not state.is_world_process_zero:
            return
        model = kwargs["model"]
        check_layers(model, self.layers)
        check_whole(
            model, "reads the documents: measure its checkpoints with hf_xent.metrics.geometry.by_layer instead"
        )
        if self.documents is None:
            reading: dict[str, Any] = {"tokenizer": kwargs.get("processing_class")}
            self.documents = Documents(self.texts, **reading | self.reading)
        warn_if_few(len(self.documents), model.config.get_text_config().hidden_size)
        self.rows = [_unprefixed(entry) for entry in state.log_history if f"{PREFIX}layer" in entry]
        if not self.rows and (path := self._path(args)).exists():
            path.rename(_free_name(path))
        self._measure(args, state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model if it is time; called by the trainer."""
        step = state.global_step
        due = step & (step - 1) == 0 if self.every == DOUBLING else step % int(self.every) == 0
        if due and state.is_world_process_zero:
            self._measure(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the trained model, and count tokens as before; called by the trainer."""
        if state.is_world_process_zero:
            self._measure(args, state, kwargs["model"])
        if self._tokens_counted is not None:
            args.include_num_input_tokens_seen, self._tokens_counted = self._tokens_counted, None

    def _path(self, args: Any) -> Path:
        return Path(args.output_dir, "geometry.csv") if self.file is None else Path(self.file)

    def _measure(self, args: Any, state: Any, model: Any) -> None:
        """Add the rows of this step, if it has none yet."""
        assert self.documents is not None  # made when the training began
        if any(row["step"] == state.global_step for row in self.rows):
            return
        found = by_layer(self.documents.features(model, self.layers), resamples=self.resamples, seed=args.seed)
        place = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        for layer, measured in found.items():
            row = {**place, "layer": layer, **measured}
            self.rows.append(row)
            logged = {PREFIX + name: value for name, value in row.items() if name != "step"}
            state.log_history.append({**logged, "epoch": state.epoch, "step": state.global_step})
        replace_atomically(self._path(args), lambda draft: write_rows(draft, self.rows))


def write_rows(file: Path, rows: Sequence[dict[str, float]]) -> None:
    """Write rows of measures as CSV; `hf_xent.experiments.geometry.read_curve` reads them."""
    names = [*dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])]
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        writer.writerows(rows)


def _unprefixed(entry: dict[str, Any]) -> dict[str, float]:
    """A row from an entry of the log history."""
    row = {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}
    return {"step": entry["step"], **row}


def _free_name(path: Path) -> Path:
    """A name beside a file that no file has."""
    numbered = (path.with_stem(f"{path.stem}-{i}") for i in range(1, 10**6))
    return next(other for other in numbered if not other.exists())
