"""The study of caches and the benchmark of their memory and time, on a tiny model."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from hf_xent.caches import StaircaseCache
from support.models import tiny, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBERS = 2 * 2 * 2 * 8  # layers, keys and values, heads of them, size of a head
PROMPT, SCORED = 204, 24
WORDS = list("thequickbrownfox")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and four documents, one of which is too short."""
    folder = tmp_path_factory.mktemp("caches")
    tiny(std=0.1, max_position_embeddings=512).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(WORDS[(i * i + k * i) % 16] for i in range(400)) for k in range(3)]
    rows = [json.dumps({"text": text}) for text in (texts[0], "too short", *texts[1:])]
    (folder / "text.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "cache_perplexity.py"))
    for name, value in {"PROMPT": PROMPT, "SCORED": SCORED, "ROWS": 2}.items():
        monkeypatch.setitem(example["main"].__globals__, name, value)
    return example


def test_the_study_compares_all_installed_arms_and_resumes(example, folder, tmp_path, monkeypatch):
    options = {"model": str(folder / "model"), "text": str(folder / "text.jsonl"), "contexts": 3, "output": tmp_path}
    found = example["main"](**options)
    arms = example["installed"](tiny().config)
    assert set(found) == set(arms) >= {"dense", "8,4,2", "fp8 of transformers"}
    assert all(set(rows) == {0, 1, 2} for rows in found.values()), "one context more than two batches of two"
    size = {arm: rows[0]["bytes a token"] for arm, rows in found.items()}
    assert size["dense"] == 4 * NUMBERS and size["2"] < size["8,4,2"] < size["4"] * 1.2 < size["dense"]
    off = {arm: sum(abs(rows[i]["nats"] - found["dense"][i]["nats"]) for i in rows) for arm, rows in found.items()}
    assert 0 < off["4"] < off["2"], "fewer bits are further off"
    assert (
        "Arms not installed: " in (tmp_path / "README.md").read_text() and (tmp_path / "cache_perplexity.png").exists()
    )
    monkeypatch.setitem(example["main"].__globals__, "continued", None)
    assert example["main"](**options) == found, "nothing is run twice"
    with pytest.raises(ValueError, match=r"contexts is 4, but .* has 3 documents of 228 tokens"):
        example["main"](**options | {"contexts": 4, "output": tmp_path / "more"})


def test_nats_are_those_of_one_pass_over_the_text(example):
    lm, ids = tiny(max_position_embeddings=512), torch.randint(3, 97, (2, PROMPT + SCORED))
    with torch.no_grad():
        logp = lm(ids).logits.double().log_softmax(-1)[:, PROMPT - 1 : -1]
        expected = -logp.gather(-1, ids[:, PROMPT:, None])[..., 0].mean(-1)
        filled = lm.base_model(ids[:, : PROMPT - 1], use_cache=True)
        filled = getattr(filled, "cache", None) or filled.past_key_values
        nats, sizes = example["continued"](lm, filled, DynamicCache(config=lm.config), ids)
    assert nats == pytest.approx(expected.tolist(), rel=1e-5) and sizes == [4 * NUMBERS] * SCORED


@pytest.mark.parametrize("bits", [(8, 4, 2), (4,)])
def test_a_filled_cache_is_that_of_the_model_s_own_pass(example, bits):
    """The study fills every cache from one exact pass: the model itself fills it alike."""
    lm, ids = tiny(max_position_embeddings=512), torch.randint(3, 97, (2, PROMPT))
    own, copied = (StaircaseCache(lm.config, bits=bits) for _ in range(2))
    filled = DynamicCache(config=lm.config)
    name = example["cache_name"](lm)
    with torch.no_grad():
        for cache in (own, filled):
            lm(ids[:, :-1], **{name: cache})
        for number, layer in enumerate(filled.layers):
            copied.update(layer.keys, layer.values, number)
        a, b = (lm(ids[:, -1:], **{name: cache}).logits for cache in (own, copied))
    assert torch.equal(a, b) and own.nbytes == copied.nbytes


def test_held_counts_the_tensors_of_every_kind(example):
    lm, ids = tiny(max_position_embeddings=512), torch.randint(3, 97, (2, 150))
    name = example["cache_name"](lm)
    caches = StaircaseCache(lm.config, bits=(8, 4, 2)), DynamicCache(config=lm.config), QuantizedCache("fp8", lm.config)
    with torch.no_grad():
        for cache in caches:
            lm(ids, **{name: cache})
    ours, dense, fp8 = map(example["held"], caches)
    assert ours == caches[0].nbytes and dense == 4 * NUMBERS * ids.numel()
    assert fp8 == NUMBERS * ids.numel() + 2 * 2 * 4, "a byte a number, and a scale of 4 bytes a tensor"


def test_the_benchmark_reads_the_same_text_into_every_cache(folder):
    from benchmarks import kv_caches

    lm, ids = kv_caches.opened(str(folder / "model"), str(folder / "text.jsonl"), 320)
    assert ids.shape == (1, 320)
    sizes = {}
    for arm in (kv_caches.DENSE, *kv_caches.ARMS):
        cache = kv_caches.made(arm, lm.config)
        kv_caches.fill(lm, cache, ids)
        sizes[arm] = kv_caches.held(cache)
        assert cache.get_seq_length() == 320
    assert sizes["float32"] == 4 * NUMBERS * 320
    assert sizes["2"] < sizes["8,4,2"] < sizes["8,4"] < sizes["8"] < sizes["float32"] and sizes["4"] < sizes["8,4"]
    table = kv_caches.time_table(str(folder / "model"), str(folder / "text.jsonl"), [130], rounds=1)
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == list(kv_caches.TIMED)
    assert "| float32 | " in table and "| 1.00 | 1.00 |" in table.splitlines()[2], "dense against itself"


@pytest.mark.slow  # a process loads transformers
def test_the_benchmark_s_memory_is_that_of_a_separate_process(folder):
    from benchmarks import kv_caches

    source = str(folder / "model"), str(folder / "text.jsonl")
    size, resident, peak = kv_caches.in_a_process("8,4,2", *source, 320)
    lm, ids = kv_caches.opened(*source, 320)
    cache = kv_caches.made("8,4,2", lm.config)
    kv_caches.fill(lm, cache, ids)
    assert size == cache.nbytes and resident <= peak and peak > 0
