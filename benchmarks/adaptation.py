"""What adaptation at test time adds to a forward pass of the same batch, for each method of `hf_xent.adapt`.

Every contestant has a model with random weights, of the size it is used with, and one batch. A round times the model's
forward pass of that batch in evaluation mode, without gradients, and then the method's answer for it, which has its own
forward passes within; the ratio of a round is of those two. Medians over rounds, so what the machine does besides
touches both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_xent.adapt import RMT, TFUP, RePRI, TransductiveTagger, features
from hf_xent.system.machine import cpu_name

Contestant = tuple[str, Callable[[], object], Callable[[], object]]
"""What is done to which batch, the forward pass, and the method."""
VIT: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
IMAGES, SIDE, CLASSES = 8, 128, 10


def page(rounds: int) -> str:
    """The table, as Markdown."""
    torch.manual_seed(0)
    lines = ["| | forward, ms | method, ms | ratio |", "|---|---|---|---|"]
    for make in (episodes, tags, caches, streams):
        name, forward, method = make()
        lines.append(f"| {name} | {' | '.join(_cells(forward, method, rounds))} |")
    about = f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, float32, random weights:"
    about += f" medians of {rounds} rounds."
    command = "`python -m benchmarks adaptation` makes this page."
    return "\n\n".join(["# Adaptation at test time", command, f"{about}\n{__doc__}".strip(), "\n".join(lines)])


def episodes() -> Contestant:
    """RePRI for a batch of tasks, each of an image that is marked and one to segment, on patches of a small ViT."""
    model = ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **VIT)).eval()
    images = torch.randn(2, IMAGES, 3, SIDE, SIDE)
    masks = torch.zeros(IMAGES, 1, SIDE, SIDE, dtype=torch.long)
    masks[..., 32:96, 32:96] = 1
    both = images.flatten(0, 1)
    name = f"`RePRI.segment`, {IMAGES} tasks of 1 shot, {SIDE} x {SIDE} pixels, 49 steps"
    return name, lambda: model(both), lambda: RePRI().segment(model, images[0][:, None], masks, images[1])


def tags() -> Contestant:
    """The tagger for 32 sentences, with 5 marked ones."""
    tokenizer = words()
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **BERT)).eval()
    sentences = [[f"w{(7 * i + k) % 90}" for k in range(20)] for i in range(37)]
    marks = [[int(k == 3) for k in range(20)] for _ in range(5)]
    tagger = TransductiveTagger(model, tokenizer, batch_size=64)
    batch = tokenizer(sentences, is_split_into_words=True, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    name = "`TransductiveTagger.tag`, 32 sentences of 20 words, 5 marked ones, 49 steps"
    return name, lambda: model(**inputs), lambda: tagger.tag(sentences[:5], marks, sentences[5:])


def words() -> Any:
    """A tokenizer of words, for a model with random weights."""
    made = Tokenizer(WordLevel({"[PAD]": 0, **{f"w{i}": i + 1 for i in range(90)}}, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[PAD]")


def caches() -> Contestant:
    """TFUP's logits of a batch, behind its features; the cache was filled before."""
    model, images = classifier()
    cache = TFUP(torch.randn(CLASSES, VIT["hidden_size"])).fit(torch.randn(640, VIT["hidden_size"]))
    batch = {"pixel_values": images}
    name = f"`TFUP.logits` of features, {len(images)} images of {SIDE} x {SIDE} pixels, {CLASSES} classes"
    return name, lambda: model(**batch), lambda: cache.logits(features(model, batch))


def streams() -> Contestant:
    """A step of RMT on a batch, with a batch of as many source rows."""
    model, images = classifier()
    rows = [{"pixel_values": image, "labels": i % CLASSES} for i, image in enumerate(images)]
    rmt = RMT(copy.deepcopy(model), source=rows, source_batch_size=len(rows))
    batch = {"pixel_values": images}
    name = f"`RMT.predict`, {len(images)} images of {SIDE} x {SIDE} pixels, as many source rows"
    return name, lambda: model(**batch), lambda: rmt.predict(batch)


def classifier() -> tuple[Any, torch.Tensor]:
    """A small ViT with classes, and a batch of images."""
    config = ViTConfig(image_size=SIDE, patch_size=16, num_labels=CLASSES, **VIT)
    return ViTForImageClassification(config).eval(), torch.randn(32, 3, SIDE, SIDE)


def _cells(forward: Callable[[], object], method: Callable[[], object], rounds: int) -> list[str]:
    """Medians of both, in milliseconds, and of their ratio."""
    pairs = []
    for _ in range(rounds + 1):  # the first one warms up
        with torch.no_grad():
            before = _seconds(forward)
        pairs.append((before, _seconds(method)))
    plain, ours = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratio = statistics.median(after / before for before, after in pairs[1:])
    return [f"{1e3 * plain:.0f}", f"{1e3 * ours:.0f}", f"{ratio:.2f}"]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
