"""Tiny two-tower models and encoders from random weights, with a batch for each of their inputs."""

from types import SimpleNamespace

import torch
import transformers

K, N, D = 3, 6, 8
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = {**SIZES, "vocab_size": 97, "max_position_embeddings": 16}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}
PROCESSOR = SimpleNamespace(image_mean=[0.5], image_std=[0.5], save_pretrained=lambda folder, **options: None)
"""What an attack reads of an image processor: pixels from 0 to 1 are inputs from -1 to 1."""


def draw(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(kind, config):
    model = getattr(transformers, kind)(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # as large as those of a trained model
            if weight.ndim > 1:
                weight.normal_(std=0.3, generator=draw)
    return model


def clip():
    config = transformers.CLIPConfig(text_config={**TEXT, **ENDS}, vision_config=IMAGE, projection_dim=D)
    return built("CLIPModel", config)


def siglip():
    config = transformers.SiglipConfig(text_config={**TEXT, **ENDS, "projection_size": D}, vision_config=IMAGE)
    return built("SiglipModel", config)


def clap():
    audio = {
        "spec_size": 32, "num_mel_bins": 8, "window_size": 2, "patch_size": 4, "patch_stride": [4, 4], "depths": [1, 1],
        "num_attention_heads": [1, 2], "hidden_size": 16, "patch_embeds_hidden_size": 8, "projection_dim": D,
        "num_classes": 4, "aff_block_r": 2,
    }  # fmt: skip
    text = {**TEXT, **ENDS, "projection_dim": D, "max_position_embeddings": 20}
    return built("ClapModel", transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=D))


def vit(labels=K):
    plain = {"hidden_dropout_prob": 0.5}  # without effect in evaluation mode
    return built("ViTForImageClassification", transformers.ViTConfig(**IMAGE, **plain, num_labels=labels))


def images(count=N, seed=3):
    """Inputs within -1 and 1."""
    return {"pixel_values": draw(count, 1, 8, 8, seed=seed).tanh()}


def texts(count=N):
    ids = torch.randint(3, 97, (count, 6), generator=torch.Generator().manual_seed(1))
    ids[:, 5] = 2
    ids[: count // 2, 4:] = torch.tensor([2, 0])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def sounds(count=N):
    return {"input_features": draw(count, 1, 16, 8), "is_longer": torch.zeros(count, 1, dtype=torch.bool)}


TOWERS = {
    "CLIP images": (clip, images),
    "CLIP texts": (clip, texts),
    "SigLIP images": (siglip, images),
    "SigLIP texts": (siglip, texts),
    "CLAP sounds": (clap, sounds),
    "CLAP texts": (clap, texts),
}
"""Name -> the model, and a batch of one tower."""
