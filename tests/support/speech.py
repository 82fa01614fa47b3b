"""Tiny speech models with a CTC head, from random weights, and batches of rows for them."""

import torch
import transformers
from transformers import BertConfig, BertModel

CHARACTERS, D = 7, 8
"""Labels of CTC, the blank 0 included, and the width of states."""
STILL = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
LAYERS = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
CONVOLUTIONS = {
    "conv_dim": (4, 4), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}  # fmt: skip
CTC = {"vocab_size": CHARACTERS, "pad_token_id": 0, "ctc_zero_infinity": True}
MEL = 6


def of_waves(kind, **options):
    config = getattr(transformers, f"{kind}Config")(
        **LAYERS, **STILL, **CONVOLUTIONS, **CTC, feat_proj_dropout=0.0, final_dropout=0.0, apply_spec_augment=False,
        **{"ctc_loss_reduction": "sum", **options},
    )  # fmt: skip
    return built(f"{kind}ForCTC", config)


def wav2vec2_bert(**options):
    config = transformers.Wav2Vec2BertConfig(
        **LAYERS, **STILL, **CTC, feature_projection_input_dim=MEL, feat_proj_dropout=0.0, final_dropout=0.0,
        conformer_conv_dropout=0.0, conv_depthwise_kernel_size=3, apply_spec_augment=False,
        **{"ctc_loss_reduction": "sum", **options},
    )  # fmt: skip
    return built("Wav2Vec2BertForCTC", config)


def lasr(**options):
    inner = {**LAYERS, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
    encoder = {**inner, "num_mel_bins": MEL, "subsampling_conv_channels": 4, "conv_kernel_size": 3}
    return built("LasrForCTC", transformers.LasrCTCConfig(encoder_config=encoder, **CTC, **options))


def parakeet(**options):
    inner = {**LAYERS, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
    encoder = {
        **inner, "num_mel_bins": 8, "subsampling_factor": 2, "subsampling_conv_channels": 4, "conv_kernel_size": 3,
        "dropout_positions": 0.0,
    }  # fmt: skip
    return built("ParakeetForCTC", transformers.ParakeetCTCConfig(encoder_config=encoder, **CTC, **options))


MODELS = {
    "wav2vec2": (lambda **options: of_waves("Wav2Vec2", **options), ("input_values",)),
    "adapter": (
        lambda **options: of_waves("Wav2Vec2", add_adapter=True, num_adapter_layers=1, output_hidden_size=6, **options),
        ("input_values",),
    ),
    "hubert": (lambda **options: of_waves("Hubert", **options), ("input_values",)),
    "wav2vec2_bert": (wav2vec2_bert, ("input_features", MEL)),
    "lasr": (lasr, ("input_features", MEL)),
    "parakeet": (parakeet, ("input_features", 8)),
}
"""Name -> how it is built, and what it reads: the column, and the bins of a frame."""


def built(name, config):
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


def text_encoder(width=D, seed=1):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=9, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def rows_of(name="wav2vec2", count=6, seed=0):
    """Rows of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def ids(low, high, length):
        return torch.randint(low, high, (length,), generator=generator).tolist()

    column, *bins = MODELS[name][1]
    rows = []
    for i in range(count):
        length = 40 + 9 * (i * 5 % 4) if column == "input_values" else 24 + 5 * (i * 5 % 4)
        size = 2 + i % 3
        text = {"labels": ids(1, CHARACTERS, size), "text_input_ids": ids(1, 9, size + 2)}
        rows.append({column: draw(length, *bins).tolist(), **text})
    return rows
