"""The models of siamese_ctc.py and speech_translation.py: a speech encoder, a text encoder, a decoder, all small."""

from __future__ import annotations

from spoken_prompts import BINS, END, PAD, STACK, START, VOCABULARY
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    SpeechEncoderDecoderModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    set_seed,
)

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


def speech_config() -> Wav2Vec2BertConfig:
    """Two conformer layers over log-mel frames, 25 a second."""
    still = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"), 0.0)
    more = dict.fromkeys(("feat_proj_dropout", "final_dropout", "conformer_conv_dropout"), 0.0)
    ctc = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "ctc_loss_reduction": "sum", "ctc_zero_infinity": True}
    sizes = {**SIZES, "num_hidden_layers": 2, "feature_projection_input_dim": STACK * BINS}
    return Wav2Vec2BertConfig(**sizes, **still, **more, **ctc, conv_depthwise_kernel_size=15, apply_spec_augment=False)


def ctc_model(seed: int) -> Wav2Vec2BertForCTC:
    """The speech encoder with a head of letters."""
    set_seed(seed)
    return Wav2Vec2BertForCTC(speech_config())


def text_model(seed: int) -> BertModel:
    """Two layers over letters."""
    set_seed(seed + 1)
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=128, **SIZES)
    return BertModel(config, add_pooling_layer=False)


def decoder_model(seed: int, encoder: Wav2Vec2BertModel | None = None) -> SpeechEncoderDecoderModel:
    """A speech encoder and two layers that write letters."""
    encoder = ctc_model(seed).wav2vec2_bert if encoder is None else encoder
    set_seed(seed + 2)
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=160, **SIZES)
    config.is_decoder = config.add_cross_attention = True
    model = SpeechEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(config))
    special = {"decoder_start_token_id": START, "pad_token_id": PAD, "eos_token_id": END}
    model.config.update(special)
    model.generation_config.update(**special)
    return model
