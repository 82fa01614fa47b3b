"""Features of any encoder equal those that the model itself makes, and what has none is refused."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    ClapConfig,
    CLIPConfig,
    ConvNextConfig,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    RobertaConfig,
    SiglipConfig,
    T5Config,
    ViTConfig,
)

from hf_xent.models.embeddings import class_texts, embedded, encoded, features, prototypes, token_embedding
from support.models import tiny_tokenizer

SIZES = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, "max_position_embeddings": 24}
IMAGE = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
IMAGE |= {"image_size": 8, "patch_size": 4}
SOUND = {"hidden_size": 32, "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16}
SOUND |= {"num_mel_bins": 16, "spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4}
CONFIGS = {
    "clip": lambda: CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8),
    "siglip": lambda: SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=IMAGE),
    "clap": lambda: ClapConfig(text_config=TEXT, audio_config=SOUND, projection_dim=8),
    "bert": lambda: BertConfig(**TEXT),
    "roberta": lambda: RobertaConfig(**{**TEXT, "pad_token_id": 1, "bos_token_id": 0}),
    "gpt2": lambda: GPT2Config(vocab_size=90, n_embd=16, n_layer=2, n_head=2, n_positions=24, pad_token_id=0),
    "llama": lambda: LlamaConfig(**TEXT, num_key_value_heads=1),
    "vit": lambda: ViTConfig(**IMAGE),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
    "t5": lambda: T5Config(vocab_size=90, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
}
IDS = torch.tensor([[5, 7, 9, 11, 2], [5, 8, 2, 0, 0]])
TOKENS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
LEFT = {"input_ids": (flipped := torch.stack([IDS[0], IDS[1].roll(2)])), "attention_mask": (flipped != 0).long()}
NAMES = ["fox", "the lazy dog", "over"]


def made(name, maker=AutoModel, std=0.2, **changes):
    """A random model in evaluation mode, whose rows differ."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.update(changes)
    model = maker.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="module")
def clip():
    """A two-tower model."""
    return made("clip")


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer whose texts end in the end token, as those of text towers do."""
    from tokenizers.processors import TemplateProcessing

    found = tiny_tokenizer()
    found._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return found


def images(size=8):
    """Two images, the same in every call."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip", "clap"])
def test_towers_are_their_own_embeddings(name):
    model = made(name)
    sound = torch.randn(2, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    ways = {"get_text_features": TOKENS}
    ways |= {"get_audio_features": {"input_features": sound}} if name == "clap" else {}
    ways |= {"get_image_features": {"pixel_values": images()}} if name != "clap" else {}
    for method, batch in ways.items():
        own = getattr(model, method)(**batch).pooler_output
        assert torch.equal(features(model, batch, normalize=False), own)
        assert torch.equal(features(model, {**batch, "labels": torch.tensor([0, 1])}), F.normalize(own))
    if name == "clip":  # what the model's own similarity is of
        whole = model(**TOKENS, pixel_values=images())
        similarity = model.logit_scale.exp() * features(model, TOKENS) @ features(model, ways["get_image_features"]).T
        torch.testing.assert_close(similarity, whole.logits_per_text)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "head", "batch"),
    [
        ("bert", "classifier", TOKENS),
        ("roberta", "classifier.out_proj", TOKENS),
        ("gpt2", "score", TOKENS),
        ("gpt2", "score", LEFT),
        ("llama", "score", TOKENS),
        ("llama", "score", LEFT),
        ("vit", "classifier", {"pixel_values": images()}),
        ("resnet", "classifier.1", {"pixel_values": images(32)}),
        ("convnext", "classifier", {"pixel_values": images(16)}),
    ],
)
def test_of_a_classifier_they_are_what_its_head_sees(name, head, batch):
    images = "pixel_values" in batch
    maker = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    model = made(name, maker, num_labels=3)
    found = features(model, batch, normalize=False)
    assert found.shape[0] == 2 and not torch.allclose(found[0], found[1])
    torch.testing.assert_close(model.get_submodule(head)(found), model(**batch).logits)


@torch.no_grad()
def test_of_a_decoder_they_do_not_depend_on_the_side_of_padding():
    model = made("llama", AutoModelForSequenceClassification, num_labels=3)
    alone = features(model, {"input_ids": IDS[1:, :3]})
    torch.testing.assert_close(features(model, TOKENS)[1:], alone)
    torch.testing.assert_close(features(model, LEFT)[1:], alone)  # positions are relative


@torch.no_grad()
def test_of_an_encoder_they_are_the_mean_of_what_is_not_padding():
    model = made("bert")
    states = model(**TOKENS).last_hidden_state
    expected = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    torch.testing.assert_close(features(model, TOKENS, normalize=False), expected)
    torch.testing.assert_close(features(model, TOKENS), expected / expected.norm(dim=1, keepdim=True))
    alone = features(model, {"input_ids": IDS[1:, :3]}, normalize=False)  # without a mask: all of them
    torch.testing.assert_close(alone, expected[1:])
    net = made("resnet")
    torch.testing.assert_close(
        features(net, {"pixel_values": images(32)}, normalize=False), net(images(32)).pooler_output.flatten(1)
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_float32_or_wider(clip, dtype):
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    for model, batch in ((clip, {"pixel_values": images()}), (made("bert"), TOKENS)):
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        found = features(deepcopy(model).to(dtype), cast)
        assert found.dtype == wider
        torch.testing.assert_close(found.norm(dim=1), torch.ones(2, dtype=wider))
        assert (found * features(model, batch)).sum(1).min() > 0.999


def test_gradients_reach_the_inputs(clip):
    pixels = images().requires_grad_()
    features(clip, {"pixel_values": pixels})[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0
    clip.zero_grad(set_to_none=True)


def test_what_has_no_vector_for_a_row_is_refused(clip):
    refused = [
        (clip, {**TOKENS, "pixel_values": images()}, "pixel_values and input_ids: give the inputs of one tower"),
        (made("bert", AutoModelForTokenClassification, num_labels=3), TOKENS, "pass one of whole rows"),
        (made("gpt2", AutoModelForCausalLM), TOKENS, "neither an encoder nor a classifier"),
        (made("t5"), {**TOKENS, "decoder_input_ids": IDS}, "neither an encoder nor a classifier"),
    ]
    for model, batch, message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            features(model, batch)
        assert "\n" not in str(caught.value)


def test_prototypes_are_class_means():
    rows = torch.tensor([[1.0, 0], [3, 0], [0, 5], [7, 7]])
    labels = torch.tensor([1, 1, 0, 2])
    assert torch.equal(prototypes(rows, labels), torch.tensor([[0.0, 5], [2, 0], [7, 7]]))
    many = torch.full((5000, 1), 1.5, dtype=torch.float16)  # whose sum in half precision stops growing
    assert torch.equal(prototypes(many, torch.zeros(5000, dtype=torch.long)), torch.tensor([[1.5]]))
    for bad, count, message in (
        ([0, 0, 0, 2], None, "no row of class 1"),
        ([0, 0, 0, 2], 2, "labels are 0 to 2, but there are 2"),
        ([0, 0, -100, 1], None, "labels are -100"),
        ([0, 1], None, "a label for each"),
    ):
        with pytest.raises(ValueError, match=message):
            prototypes(rows, torch.tensor(bad), count)
    with pytest.raises(ValueError, match="give rows"):
        prototypes(rows[:0], labels[:0])


@torch.no_grad()
def test_texts_keep_their_order_and_do_not_change_with_their_batch(clip, tokenizer):
    texts = ["the quick brown fox jumps", "dog", "over the lazy dog", "fox", "brown"]
    clip.train()
    found = encoded(clip, tokenizer, texts, batch_size=2)
    assert clip.training
    clip.eval()
    for text, row in zip(texts, found, strict=True):
        batch = tokenizer([text], return_tensors="pt")
        own = clip.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        torch.testing.assert_close(row, F.normalize(own)[0])
    bare = encoded(clip, tokenizer, texts, normalize=False)
    torch.testing.assert_close(F.normalize(bare), found)


@torch.no_grad()
def test_names_are_the_mean_over_templates_of_unit_length(clip, tokenizer):
    forms = ["the {}", "{} jumps over {}", "{}"]
    found = class_texts(clip, tokenizer, NAMES, forms, batch_size=4)
    for name, row in zip(NAMES, found, strict=True):
        texts = [f"the {name}", f"{name} jumps over {name}", name]
        torch.testing.assert_close(row, F.normalize(encoded(clip, tokenizer, texts, normalize=False).mean(0), dim=0))
    bare = class_texts(clip, tokenizer, NAMES, normalize=False)
    torch.testing.assert_close(bare, encoded(clip, tokenizer, NAMES, normalize=False))
    assert torch.equal(class_texts(clip, tokenizer, NAMES), F.normalize(bare))


@torch.no_grad()
def test_long_texts_are_cut_where_the_model_ends(clip, tokenizer):
    long = "the quick brown fox " * 20
    for model, room in ((clip, 24), (made("roberta"), 22)):  # positions of the latter begin after its padding's
        found = encoded(model, tokenizer, [long, "fox"])
        cut = tokenizer([long], truncation=True, max_length=room, return_tensors="pt")
        torch.testing.assert_close(found[:1], features(model, {"input_ids": cut["input_ids"]}))
        with pytest.raises(ValueError, match=f"max_length is 25, but the model has {room} positions"):
            encoded(model, tokenizer, [long], max_length=25)
    short = encoded(clip, tokenizer, [long], max_length=5)
    cut = tokenizer([long], truncation=True, max_length=5, return_tensors="pt")["input_ids"]
    assert cut.shape == (1, 5)
    torch.testing.assert_close(short, features(clip, {"input_ids": cut}))


@torch.no_grad()
def test_a_tower_that_reads_padding_is_given_texts_filled_up(tokenizer):
    model = made("siglip")
    found = encoded(model, tokenizer, NAMES, batch_size=1)
    filled = tokenizer(NAMES, padding="max_length", max_length=24, return_tensors="pt")  # as its documentation says
    filled.pop("token_type_ids", None)
    torch.testing.assert_close(found, F.normalize(model.get_text_features(**filled).pooler_output))
    with pytest.raises(ValueError, match=r"max_length is 8, but the text tower was trained .* choose 24"):
        encoded(model, tokenizer, NAMES, max_length=8)


def test_bad_texts_are_refused(clip, tokenizer):
    without = tiny_tokenizer()  # which adds no tokens
    endless = tiny_tokenizer()
    endless.pad_token = None
    for call, message in (
        (lambda: encoded(clip, tokenizer, []), "texts are .*: give a list of one or more"),
        (lambda: encoded(clip, tokenizer, "fox"), "texts are 'fox'"),
        (lambda: encoded(clip, tokenizer, NAMES, batch_size=0), "batch_size is 0"),
        (lambda: encoded(clip, tokenizer, NAMES, max_length=0), "max_length is 0"),
        (lambda: encoded(clip, without, ["fox", ""]), "texts have one without a token"),
        (lambda: encoded(clip, endless, NAMES), "no padding token: set tokenizer.pad_token"),
        (lambda: class_texts(clip, tokenizer, "fox"), "names are 'fox'"),
        (lambda: class_texts(clip, tokenizer, NAMES, "a {}"), "templates 'a {}'"),
        (lambda: class_texts(clip, tokenizer, []), "names number 0"),
        (lambda: class_texts(clip, tokenizer, NAMES, []), "templates are"),
        (lambda: class_texts(clip, tokenizer, NAMES, ["a {}", "a"]), "each template with {}"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "bert", "gpt2"])
def test_embeddings_take_the_place_of_ids(name):
    model = made(name)
    table = token_embedding(model)
    assert table.weight.shape == (90, 16)
    plain = features(model, TOKENS)
    with embedded(model, table(IDS)):
        assert torch.equal(features(model, TOKENS), plain)
    other = IDS.where(IDS != 7, 3)
    expected = features(model, {**TOKENS, "input_ids": other})
    with embedded(model, table(other)):
        torch.testing.assert_close(features(model, TOKENS), expected)
    assert not torch.allclose(plain, expected)
    assert torch.equal(features(model, TOKENS), plain)  # and the layer is as before


def test_embeddings_that_are_not_read_are_refused():
    model = made("bert")
    shapes = r"states are \(1, 5, 16\), but ids have embeddings \(2, 5, 16\)"
    with pytest.raises(ValueError, match=shapes), embedded(model, torch.zeros(1, 5, 16)):
        features(model, TOKENS)
    with pytest.raises(ValueError, match="has not read its embeddings"), embedded(model, torch.zeros(2, 5, 16)):
        pass
    with pytest.raises(ValueError, match="an encoder and a decoder"), embedded(made("t5"), torch.zeros(2, 5, 16)):
        pass
    with pytest.raises(ValueError, match="without a table of token embeddings"):
        token_embedding(made("vit"))
    torch.testing.assert_close(features(model, TOKENS), features(made("bert"), TOKENS))  # no hook is left
