"""Train speech recognition beside a text encoder.

Data: a column of sounds ('file', paths of WAV files, or 'audio') and 'text', its transcript: 'asterisk:FOLDER', ...
Example: hf-xent siamese-ctc --model_name_or_path my/wav2vec2 --dataset_name asterisk:FOLDER --text_encoder my/bert
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import DataArguments, Recipe, Setup, split_rows

SOUNDS = ("file", "audio", "path")


@dataclass
class SpeechArguments(DataArguments):
    """Where the sounds come from, and which text encoder is beside them."""

    dataset_name: str = field(
        default="",
        metadata={"help": "The sounds: 'asterisk:FOLDER', a JSON, CSV or Parquet file, a folder, or a Hub id."},
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "The text encoder, by Hub id or path; none with --ot_weight 0."}
    )
    text_column: str = field(default="text", metadata={"help": "The column of transcripts."})
    sound_column: str | None = field(
        default=None, metadata={"help": "The column of sounds; default: file, audio or path."}
    )
    max_seconds: float = field(default=20.0, metadata={"help": "Longer sounds are left out."})
    lower_case: bool = field(default=False, metadata={"help": "Learn transcripts in lower case."})
    upper_case: bool = field(default=False, metadata={"help": "Learn transcripts in upper case."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds is {self.max_seconds}: choose a number above 0")
        if self.lower_case and self.upper_case:
            raise ValueError("lower_case and upper_case are both given: choose one, as the tokenizer writes")

    def cased(self, text: str) -> str:
        """A transcript as it is learned."""
        return text.lower() if self.lower_case else text.upper() if self.upper_case else text


class SiameseCTC(Recipe):
    """`SiameseCTCTrainer` from the command line."""

    trainer, config = "SiameseCTCTrainer", "siamese_ctc:SiameseCTCConfig"
    arguments = SpeechArguments

    def check(self, setup: Setup) -> None:
        """Raises: ValueError without data, without the text encoder that the transport needs, or with adapters."""
        if not setup.data.dataset_name:
            raise ValueError(
                "dataset_name is not given, and no sounds are packaged: name a Hub id, a file with the columns 'file'"
                " and 'text', or 'asterisk:FOLDER' with --dataset_name (hf_xent.data.asterisk says how to get them)"
            )
        if setup.model.model_name_or_path == "smollm2":
            raise ValueError(
                "model_name_or_path is 'smollm2', a model of texts: name a model of AutoModelForCTC, such as"
                " facebook/wav2vec2-base-960h"
            )
        if setup.config.ot_weight and setup.data.text_encoder is None:
            raise ValueError(
                f"text_encoder is not given, but ot_weight is {setup.config.ot_weight}: name one with --text_encoder,"
                " or set --ot_weight 0"
            )
        if not setup.config.ot_weight and setup.data.text_encoder is not None:
            raise ValueError("ot_weight is 0, so text_encoder has no effect: leave it out, or set ot_weight")
        if setup.model.use_peft:
            raise ValueError("use_peft is True, but both encoders are trained whole: leave it out")

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """The speech model, and its processor."""
        from transformers import AutoModelForCTC, AutoProcessor

        from ..models.loading import explain_load_errors
        from .models import load, refuse_idle_adapters

        refuse_idle_adapters(setup.model)
        model = load(AutoModelForCTC, setup.model)
        with explain_load_errors(setup.model.model_name_or_path) as source:
            return model, AutoProcessor.from_pretrained(source)

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The sounds, their labels, the text encoder, and the transcripts as it reads them."""
        from transformers import AutoModel

        from ..models.loading import explain_load_errors, tokenizer_of

        data: SpeechArguments = setup.data
        encoder = reader = None
        if data.text_encoder is not None:
            with explain_load_errors(data.text_encoder) as source:
                encoder = AutoModel.from_pretrained(source)
            encoder = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder
            reader = tokenizer_of(data.text_encoder)
        train, test = split_rows(
            data, lambda source, split: _spoken(source, split, data, tokenizer, reader), setup.config.seed
        )
        return {"train_dataset": train, "eval_dataset": test, "text_encoder": encoder}


def _spoken(source: str, split: str | None, data: SpeechArguments, processor: Any, reader: Any) -> Any:
    """Sounds as the model reads them, with the ids of their transcripts. Raises: ValueError if there are none."""
    from ..data.text import load_rows

    rows = load_rows(source, split)
    known = rows.column_names
    sounds = data.sound_column or next((name for name in SOUNDS if name in known), SOUNDS[0])
    for name, option in ((sounds, "sound_column"), (data.text_column, "text_column")):
        if name not in known:
            raise ValueError(f"{source} has no column {name!r}, but {', '.join(known)}: name one with --{option}")
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    rate = processor.feature_extractor.sampling_rate

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        wave = _wave(row[sounds], folder, rate)
        text = data.cased(row[data.text_column])
        found = processor.feature_extractor(wave, sampling_rate=rate)
        column = next(name for name in ("input_values", "input_features") if name in found)
        ids = {"labels": processor.tokenizer(text)["input_ids"]}
        if reader is not None:
            ids["text_input_ids"] = reader(text, truncation=True)["input_ids"]
        return {column: found[column][0], "seconds": len(wave) / rate, **ids}

    encoded = rows.map(encode, remove_columns=known, desc="sounds")
    kept = encoded.filter(lambda row: row["seconds"] <= data.max_seconds and row["labels"], desc="drop long sounds")
    if not len(kept):
        raise ValueError(f"max_seconds is {data.max_seconds}, and no sound of {source} is as short: choose more")
    return kept.remove_columns("seconds")


def _wave(sound: Any, folder: Path, rate: int) -> Any:
    """A sound's samples at a rate, from a path or a decoded column of `datasets`."""
    from math import gcd

    from ..speech import read_wav

    if isinstance(sound, str):
        path = Path(sound) if Path(sound).is_absolute() else folder / sound
        samples, own = read_wav(path)
        wave = samples.numpy()
    else:
        wave, own = sound["array"], sound["sampling_rate"]
    if own == rate:
        return wave
    from scipy.signal import resample_poly

    factor = gcd(own, rate)
    return resample_poly(wave, rate // factor, own // factor)
