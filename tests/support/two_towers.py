"""Tiny random encoders of texts, and of images beside them, with a tokenizer of words that marks both ends."""

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

_SOME = """a photo of the nice . cat dog bird fish tree stone river cloud iron music law faith number red blue green
    round abstract this is text about"""
WORDS = _SOME.split()
_SPECIAL = ["<pad>", "<unk>", "<s>"]
END = len(_SPECIAL) + len(WORDS)  # the largest id, which the text tower of CLIP looks for
_TEXT = {
    "vocab_size": END + 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
_IMAGE = {**{k: _TEXT[k] for k in list(_TEXT)[1:5]}, "image_size": 8, "patch_size": 4}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of WORDS and for each mark, between <s> and </s>."""
    words = {word: i for i, word in enumerate([*_SPECIAL, *WORDS, "</s>"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("<s>", words["<s>"]), ("</s>", END)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def tiny_encoder(name: str, std: float = 0.3):
    """A random 'clip', 'siglip' or 'bert' in training mode, so that what needs evaluation mode has to set it."""
    torch.manual_seed(0)
    if name == "clip":
        ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}
        model = CLIPModel(CLIPConfig(text_config={**_TEXT, **ends}, vision_config=_IMAGE, projection_dim=12))
    elif name == "siglip":
        ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END, "projection_size": 16}
        model = SiglipModel(SiglipConfig(text_config={**_TEXT, **ends}, vision_config=_IMAGE))
    else:
        model = BertModel(BertConfig(**_TEXT, pad_token_id=0), add_pooling_layer=False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.train()
