"""Tiny random causal LMs, with the settings on which losses go wrong: scale, softcap, bias, an auxiliary loss."""

import peft
import pytest
import torch
from packaging.version import Version
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

V = 97
_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_OLD = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=8),
    "gemma2 softcap": lambda: Gemma2Config(**_LLAMA, head_dim=8, final_logit_softcapping=1.5),
    "gemma3 softcap": lambda: Gemma3TextConfig(**_LLAMA, head_dim=8, final_logit_softcapping=2.0),
    "granite scale": lambda: GraniteConfig(**_LLAMA, logits_scaling=3.0),
    "cohere scale": lambda: CohereConfig(**_LLAMA, logit_scale=0.25),
    "gpt2": lambda: GPT2Config(**_OLD, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "neox": lambda: GPTNeoXConfig(**_LLAMA, use_parallel_residual=True),
    "opt": lambda: OPTConfig(
        **_OLD,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
    "mixtral aux loss": lambda: MixtralConfig(
        **_LLAMA, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    ),
    "bert bias": lambda: BertConfig(**_SIZES, is_decoder=True),
}
SETTINGS = {
    "gemma2 softcap": ("softcap", 1.5),
    "gemma3 softcap": ("softcap", 2.0),
    "granite scale": ("scale", 1 / 3),
    "cohere scale": ("scale", 0.25),
}


def tiny(name: str = "llama", std: float = 0.2, dtype=torch.float32, **changes):
    """A random model in eval mode (no dropout) whose softmax is far from uniform, biases included."""
    config = CONFIGS[name]()
    config.update(changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def tiny_tokenizer(text: str = "the quick brown fox jumps over the lazy dog " * 8):
    """A byte-level tokenizer of at most 90 tokens, trained on the spot."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=90, special_tokens=["<pad>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def add_adapter(model, config):
    """Transformers' own way to add an adapter, without a PeftModel around the model."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers adds adapters with PEFT {MIN_PEFT_VERSION} alone, here is {peft.__version__}")
    model.add_adapter(config)
    return model


def checkpointing(model, reentrant: bool = False):
    """The model in training mode, with gradient checkpointing."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.20 or so
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model.train()


def batch(rows: int = 3, length: int = 11):
    """Token ids [B, T] and labels with ignored positions at both ends."""
    torch.manual_seed(1)
    ids = torch.randint(3, V, (rows, length))
    labels = ids.clone()
    labels[0, :4], labels[-1, -3:] = -100, -100
    return ids, labels


def gradients(model):
    """Every parameter's gradient by name; the model's are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours, stock, rtol=2e-5, floor=1e-3):
    """Relative to each parameter's norm, but at least to `floor` of the whole: key biases have zero up to rounding."""
    total = sum(g.double().norm() ** 2 for g in stock.values()) ** 0.5
    assert ours.keys() == stock.keys()
    for name, g in stock.items():
        error = (ours[name].double() - g.double()).norm() / max(g.double().norm(), floor * total)
        assert error <= rtol, f"{name}: relative error {error:.1e}"
