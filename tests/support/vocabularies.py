"""Small real tokenizers, byte-level ones and one of sentencepiece's kind, and TRL's loss across vocabularies."""

import json
import warnings
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over the lazy dog. The unbelievable news, naïve café; the end of the world " * 4


def _wrapped(tokenizer, bos, eos, **roles):
    if bos is not None:
        start = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **roles)


def byte_level(size, *, text=TEXT, bos=None, eos="</s>", pad=None, prefix=False, extra=(), alphabet=True):
    """A byte-level BPE tokenizer of at most so many tokens; `prefix` puts a space before text, `bos` before both."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    names = [name for name in (bos, eos, pad, *extra) if name is not None]
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=names, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return _wrapped(tokenizer, bos, eos, pad_token=pad)


def sentencepiece(*, bos, eos, fallback=True, text=TEXT, size=420):
    """A BPE tokenizer of pieces with U+2581 for spaces, one of them before text, and with single bytes or '<unk>'."""
    names = ["<unk>", bos, eos, *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, special_tokens=names, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _wrapped(tokenizer, bos, eos, unk_token="<unk>")


def trl_uld(**options):
    """TRL's own `ULDLoss` without cross-entropy, at its defaults except for these options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of optional libraries that are not here
        module = pytest.importorskip("trl.experimental.gold.gold_trainer", reason="this TRL has no GOLD")
    tokenizers = [options.pop(f"{whose}_tokenizer", None) for whose in ("student", "teacher")]
    config = {
        "uld_crossentropy_weight": 0.0,
        "uld_distillation_weight": 1.0,
        "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0,
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
        "use_extended_uld": True,
        "uld_token_merge_strategy": "bayesian",
        "uld_use_hybrid_loss": False,
        "uld_hybrid_matched_weight": None,
        "uld_hybrid_unmatched_weight": None,
        "beta": 0.5,
    }
    assert options.keys() <= config.keys()
    return module.ULDLoss(SimpleNamespace(**config | options), *tokenizers)


def byte_offsets(tokenizer, text):
    """(start, end) in bytes of each token of a text, by TRL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        from trl.experimental.utils import encode_with_byte_offsets
    ((_, offsets),) = encode_with_byte_offsets(tokenizer.backend_tokenizer, [text])
    return offsets
