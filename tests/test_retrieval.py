"""Grids of losses equal plain forwards of every pair, for any kind of model, and go on where they stopped."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    SiglipVisionConfig,
    SpeechEncoderDecoderConfig,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    WhisperConfig,
)

import hf_xent
from hf_xent.retrieval import WAYS, GridScorer, infogain, mutual_information, rank, scores
from hf_xent.retrieval.choice import chosen_way
from hf_xent.retrieval.information import others
from hf_xent.retrieval.reading import Reader
from hf_xent.retrieval.trees import first_tokens, packs
from support.models import V, tiny, tiny_tokenizer
from support.oracle import Largest, assert_no_worse

TEXTS = ["the fox", "the lazy dog jumps over the quick brown fox", "brown", ""]
SAID = [
    "the quick dog",
    "the quick fox jumps",
    "lazy",
    "the",
    "the quick dog",
    "over the lazy dog jumps quick over the",
]
TEMPLATES = {"template": "{} jumps", "target": " {} ", "progress": False}
SLIDING = MistralConfig(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, sliding_window=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def random(model, std=0.2):
    """The same model with normal parameters, biases and norms too, in evaluation mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def sliding():
    return random(AutoModelForCausalLM.from_config(SLIDING))


@torch.no_grad()
def dense(model, inputs, candidates):
    """The sums [A, C] from stock logits of one sequence at a time, in float64: no cache, padding, tree or patch."""
    sums = []
    for source in inputs:
        for tokens in candidates:
            if model.config.is_encoder_decoder:
                read = {
                    **source,
                    "decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]]),
                }
                at = model(**read).logits[0]
            else:
                ids = torch.cat([source["input_ids"], torch.tensor([tokens])], 1)
                rest = {name: x for name, x in source.items() if name not in ("input_ids", "attention_mask")}
                at = model(input_ids=ids, **rest).logits[0, source["input_ids"].shape[1] - 1 : -1]
            sums.append(float(F.cross_entropy(at.double(), torch.tensor(tokens), reduction="sum")))
    return np.array(sums).reshape(len(inputs), len(candidates))


def compare(model, sources, candidates, ways=(None, *WAYS), **options):
    """Every way gives the sums of plain forwards."""
    encoder = GridScorer(model, options.pop("processor", None), **TEMPLATES).encoder
    inputs, tokens = list(map(encoder.source, sources)), list(map(encoder.candidate, candidates))
    expected = dense(model, inputs, tokens)
    assert expected.std(0).max() > 0.01, "sources matter"
    for way in ways:
        for size in (4, 256):
            grid = scores(model, encoder.processor, sources, candidates, way=way, batch_tokens=size, **TEMPLATES)
            np.testing.assert_allclose(grid.sums, expected, rtol=2e-6, atol=2e-5, err_msg=f"{way}, {size}")
    assert grid.tokens.tolist() == list(map(len, tokens))
    np.testing.assert_array_equal(grid.means, grid.sums / list(map(len, tokens)))
    assert "_hf_xent" not in model.__dict__, "patched for the occasion"
    return encoder, inputs, tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2 softcap", "gemma3 softcap", "granite scale", "opt"])
def test_decoders(name, tokenizer):
    """Prompts of four lengths, one of them without a word; candidates that repeat, share words, or have one."""
    model = tiny(name)
    encoder, inputs, tokens = compare(model, TEXTS, SAID, processor=tokenizer)
    with torch.no_grad():
        assert chosen_way(encoder, sorted(set(tokens)), inputs) == "trees"


def test_a_mask_of_four_dimensions_is_not_for_every_decoder(tokenizer):
    """Mixtral's auxiliary loss reads the mask, and within a sliding window a tree's mask has too many keys."""
    for model in (tiny("mixtral aux loss"), sliding()):
        encoder, inputs, tokens = compare(model, TEXTS, SAID, (None, "chains", "alone"), processor=tokenizer)
        with torch.no_grad():
            assert chosen_way(encoder, sorted(set(tokens)), inputs) == "chains"


def test_recurrent_states_are_not_shared(tokenizer):
    config = MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = random(AutoModelForCausalLM.from_config(config), 0.5)
    with pytest.warns(UserWarning, match="every pair is read alone"):
        compare(model, TEXTS[:2], SAID[:3], (None, "alone"), processor=tokenizer)
    with pytest.raises(ValueError, match="way is 'chains', but model is a MambaForCausalLM: it has recurrent states"):
        scores(model, tokenizer, TEXTS, SAID, way="chains", **TEMPLATES)


SIZES = {"d_model": 32, "vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
FEED = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
TRANSLATORS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(**SIZES, **LAYERS, **FEED, max_position_embeddings=64, decoder_start_token_id=2)
    ),
    "marian": lambda: MarianMTModel(
        MarianConfig(**SIZES, **LAYERS, **FEED, max_position_embeddings=64, decoder_start_token_id=0)
    ),
}


@pytest.mark.parametrize("name", TRANSLATORS)
def test_encoders_with_decoders(name, tokenizer):
    """The encoder runs once for a source, though candidates come in several batches."""
    model = random(TRANSLATORS[name](), 0.4)
    compare(model, TEXTS[:3], SAID, (None, "chains", "alone"), processor=tokenizer)
    calls = []
    hook = model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    scores(model, tokenizer, TEXTS[:3], SAID, way="chains", batch_tokens=4, **TEMPLATES)
    hook.remove()
    assert len(calls) == 3
    with pytest.raises(ValueError, match="way is 'trees'"):
        scores(model, tokenizer, TEXTS, SAID, way="trees", **TEMPLATES)


def test_recordings(tokenizer):
    """Whisper reads features; a speech encoder of another width than the decoder's reads samples."""
    whisper = WhisperConfig(
        **{**SIZES, "vocab_size": V}, **LAYERS, **FEED, num_mel_bins=8, max_source_positions=10,
        max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(2)
    features = [{"input_features": torch.randn(1, 8, 20)} for _ in range(3)]
    compare(
        random(AutoModelForSpeechSeq2Seq.from_config(whisper)), features, SAID, (None, "chains"), processor=tokenizer
    )
    ears = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(4, 4), conv_stride=(4, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    decoder = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True)
    both = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(ears, decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    samples = [{"input_values": torch.randn(1, 200), "attention_mask": torch.ones(1, 200)} for _ in range(2)]
    model = random(AutoModelForSpeechSeq2Seq.from_config(both), 0.5)
    compare(model, samples, SAID, (None, "chains"), processor=tokenizer)


def test_images(tokenizer):
    """The image's features stand in the prompt, whose keys and values all candidates share."""
    eyes = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=eyes, text_config=text, image_token_index=V - 1, vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )  # fmt: skip
    model = random(LlavaForConditionalGeneration(config))
    torch.manual_seed(2)
    prompt = torch.tensor([[1, *[V - 1] * 4, 5, 6]])
    pictures = [{"input_ids": prompt, "pixel_values": torch.randn(1, 3, 8, 8)} for _ in range(3)]
    pictures[0]["attention_mask"] = torch.ones_like(prompt)
    encoder, inputs, tokens = compare(model, pictures, SAID, (None, "chains", "alone"), processor=tokenizer)
    with torch.no_grad():
        assert chosen_way(encoder, sorted(set(tokens)), inputs) != "alone"


def test_half_precision_is_no_worse_than_plain_forwards(tokenizer):
    model, half = tiny(), tiny(dtype=torch.bfloat16)
    model.load_state_dict(half.float().state_dict())
    half = half.bfloat16()
    encoder = GridScorer(half, tokenizer, **TEMPLATES).encoder
    inputs, tokens = list(map(encoder.source, TEXTS)), list(map(encoder.candidate, SAID))
    truth, stock = (torch.from_numpy(dense(m, inputs, tokens)) for m in (model, half))
    for way in WAYS:
        grid = scores(half, tokenizer, TEXTS, SAID, way=way, **TEMPLATES)
        assert_no_worse(torch.from_numpy(grid.sums), stock, truth, what=way)


def test_every_candidate_is_predicted_once_whatever_the_trees():
    """Each token of each candidate is one edge of it, after the nodes of the tokens before it."""
    rng = np.random.default_rng(0)
    candidates = sorted({tuple(rng.integers(3, size=rng.integers(1, 9)).tolist()) for _ in range(60)})
    for width, size in [(0, 16), (4, 16), (12, 16), (12, 1), (999, 7)]:
        made = packs(candidates, width, size)
        spelled = {
            i: [first_tokens(candidates).tokens[e]] for e, i in zip(*members(first_tokens(candidates)), strict=True)
        }
        for pack in made:
            paths = path_of(pack)
            for edge, candidate in zip(*members(pack.edges), strict=True):
                row = int(pack.edges.rows[edge])
                assert paths[row] == list(candidates[candidate][: len(paths[row])])
                spelled[candidate].append(pack.edges.tokens[edge])
            assert pack.ids.numel() <= size or len(pack.ids) == 1
        assert [tuple(map(int, spelled[i])) for i in range(len(candidates))] == candidates
    nodes = [sum(pack.ids.numel() for pack in packs(candidates, width, 1)) for width in (0, 12, 999)]
    assert nodes[0] > nodes[1] > nodes[2], "trees share"


def members(edges):
    return edges.edges.tolist(), edges.candidates.tolist()


def path_of(pack):
    """The tokens that each node reads, its own included, by the mask, and without it by the order."""
    rows, length = pack.ids.shape
    seen = torch.ones(rows, length, length).tril().bool() if pack.visible is None else pack.visible
    paths = [pack.ids[i][seen[i, node]].tolist() for i in range(rows) for node in range(length)]
    depths = pack.depths.flatten().tolist()
    real = set(pack.edges.rows.tolist())
    assert pack.visible is None or all(len(paths[row]) == depths[row] + 1 for row in real)
    return paths


@pytest.mark.parametrize("way", ["trees", "chains"])
def test_no_logits_of_the_grid_exist(tokenizer, way):
    """In chunks of eight positions of a vocabulary of 64 000, no tensor is larger than the chunk or the head."""
    model = tiny(vocab_size=64_000)
    hf_xent.patch(model, memory_budget=8 * 64_000 * 4)
    rng = np.random.default_rng(0)
    candidates = [tuple(rng.integers(64_000, size=40).tolist()) for _ in range(6)]
    scorer = GridScorer(model, tokenizer, way=way, **TEMPLATES)
    with Largest() as seen:
        grid = scorer(TEXTS[:2], candidates)
    assert seen.numel <= model.lm_head.weight.numel() == 32 * 64_000 < 40 * 64_000
    hf_xent.unpatch(model)
    expected = dense(model, [scorer.encoder.source(TEXTS[1])], candidates[:1])
    assert grid.sums[1, 0] == pytest.approx(expected[0, 0], rel=1e-6)


def test_an_interrupted_grid_goes_on(tokenizer, tmp_path, monkeypatch):
    """Rows on disk are not computed again, also of sources in another order; one of another model is refused."""
    model, folder = tiny(), tmp_path / "grid"
    expected = scores(model, tokenizer, TEXTS, SAID, **TEMPLATES).sums
    read, calls = Reader.__call__, []

    def failing(self, source):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, source)

    options = {**TEMPLATES, "way": "trees"}
    monkeypatch.setattr(Reader, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        scores(model, tokenizer, TEXTS, SAID, folder, **options)
    assert len(list((folder / "rows").iterdir())) == 2
    np.testing.assert_allclose(scores(model, tokenizer, TEXTS, SAID, folder, **options).sums, expected, rtol=1e-6)
    assert len(calls) == 5
    reordered = scores(model, tokenizer, [*TEXTS[::-1], TEXTS[0]], SAID[::-1], folder, **options)
    np.testing.assert_allclose(reordered.sums, expected[[3, 2, 1, 0, 0], ::-1], rtol=1e-6)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="rows were computed with another candidates: choose another folder"):
        scores(model, tokenizer, TEXTS, SAID[:3], folder, **options)
    with pytest.raises(ValueError, match="another model"):
        scores(tiny("gpt2"), tokenizer, TEXTS, SAID, folder, **options)
    assert sorted(json.loads((folder / "settings.json").read_text())) == ["candidates", "model"]


def test_state_of_the_model_is_left(tokenizer):
    """In training mode, with dropout: scored in evaluation mode, and left as it was."""
    model = tiny(attention_dropout=0.5).train()
    first, second = (scores(model, tokenizer, TEXTS, SAID, **TEMPLATES).sums for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def bigram(table):
    """A decoder with exact probabilities table[i, j] = p(j | i): its layer adds nothing, its norm is constant."""
    size = len(table)  # even, for rotary positions
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=32, rms_norm_eps=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(torch.tensor(table).log().T / size**0.5)  # a one-hot vector is normed to sqrt(size)
    return model


def test_pmi_is_bayes_rule(tokenizer):
    """Exact probabilities of a bigram model: tokens 1..4 are sources, equally likely; 0 stands for any of them."""
    rng = np.random.default_rng(1)
    table = rng.dirichlet(np.ones(10), size=10)
    table[0] = table[1:5].mean(0)
    candidates = [(5 + i, *rng.integers(5, 10, size=i)) for i in range(5)]  # whose first tokens differ
    sources = [{"input_ids": torch.tensor([[i]])} for i in range(5)]
    grid = scores(bigram(table), tokenizer, sources, candidates, progress=False)
    likelihood = np.array(
        [[np.prod([table[i, j] for i, j in zip((a, *c), c, strict=False)]) for c in candidates] for a in range(5)]
    )
    np.testing.assert_allclose(np.exp(-grid.sums), likelihood, rtol=1e-4)
    posterior = likelihood[1:] / likelihood[1:].sum(0)  # p(source | candidate), by Bayes' rule
    found = rank(grid.sums[1:], "pmi", alone=grid.sums[0])
    np.testing.assert_allclose(np.exp(-found) / 4, posterior, rtol=1e-4)
    assert np.array_equal(found.argsort(1), (-posterior).argsort(1))
    assert not np.array_equal(found.argsort(1), rank(grid.sums[1:]).argsort(1)), "raw losses prefer short texts"
    expected = (likelihood[1:] * np.log(likelihood[1:] / likelihood[0])).sum() / 4
    weighted = ((grid.sums[0] - grid.sums[1:]) * likelihood[1:]).sum() / 4
    assert weighted == pytest.approx(expected, rel=1e-4)


def test_mutual_information_is_that_of_the_grid(tokenizer):
    """Three losses a text; the context of another one, and none, by name."""
    model = tiny()
    texts, contexts = SAID[:4], TEXTS
    grid = scores(model, tokenizer, [*contexts, "fox"], texts, **TEMPLATES)
    found = mutual_information(model, tokenizer, texts, contexts, empty="fox", seed=3, **TEMPLATES)
    expected = infogain(np.diag(grid.sums[:4]), grid.sums[4], grid.tokens, seed=3)
    assert found.contexts.mutual.value == pytest.approx(expected.mutual.value, abs=1e-6)
    assert found.contexts.share == pytest.approx(expected.share, abs=1e-6)
    other = grid.sums[others(4, 3), np.arange(4)]
    assert found.difference.value == pytest.approx((other - np.diag(grid.sums[:4])).sum() / grid.tokens.sum(), abs=1e-6)
    with pytest.raises(ValueError, match="targets has 4 entries, contexts 3"):
        mutual_information(model, tokenizer, texts, contexts[:3])


@pytest.mark.parametrize(
    ("options", "sources", "candidates", "message"),
    [
        ({"way": "best"}, TEXTS, SAID, "way is 'best': choose one of trees, chains, alone"),
        ({"batch_tokens": 0}, TEXTS, SAID, "batch_tokens is 0"),
        ({"template": "French:"}, TEXTS, SAID, "template is 'French:': write {} once"),
        ({"target": "{}{}"}, TEXTS, SAID, "target is '{}{}'"),
        ({}, "the fox", SAID, "sources is 'the fox': pass a list"),
        ({}, TEXTS, [], r"candidates is \[\]"),
        ({}, TEXTS, ["the", ""], "a candidate is '', which has no tokens"),
        ({}, ["the " * 80], SAID, "64 positions"),
        ({}, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}], SAID, r"input_ids \(2, 3\): pass those of one"),
        (
            {},
            [{"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.tensor([[0, 1]])}],
            SAID,
            "attention_mask with zeros",
        ),
    ],
)
def test_scores_refuse(options, sources, candidates, message, tokenizer):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        scores(tiny("gpt2"), tokenizer, sources, candidates, progress=False, **options)
