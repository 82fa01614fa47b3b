"""The authors' settings for the four sizes of GPT-2, by name, for a machine with a GPU; not run by this project.

    recipe = hf_xent.trainers.ln_recipes.RECIPES["gpt2-large"]
    model, tokenizer = recipe.load()                                      # from the Hub, bfloat16, without dropout
    trainer = hf_xent.LNRemovalTrainer(model, recipe.config("out"), train_dataset=blocks)
    trainer.train()                                                       # they released out/checkpoint-600

`blocks`: 1024 tokens each, packed from OpenWebText with an end-of-text token after every document. One optimizer step
is half a million tokens. The vanilla control is `hf_xent.XentTrainer` with the same configuration.

Source: Baroni et al. 2025, arXiv:2507.02559, table of hyperparameters, with their code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ln_removal import LNRemovalConfig


@dataclass(frozen=True)
class Recipe:
    """Settings of one size; `schedule` is `Schedule.named(model)`."""

    model: str  # Hub id
    batch_size: int  # sequences of 1024 tokens in a forward pass
    accumulation: int
    learning_rate: float
    min_learning_rate: float  # where the cosine ends, at max_steps
    sigma_weight: float
    warmup_steps: int
    max_steps: int
    released: int  # the step of the published checkpoint
    sigma_momentum: float = 0.9

    def load(self, **options: Any) -> tuple[Any, Any]:
        """Model and tokenizer from the Hub; options as `from_pretrained`. Raises: OSError without a connection."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        options = {"dtype": torch.bfloat16, **dropout, **options}
        return AutoModelForCausalLM.from_pretrained(self.model, **options), AutoTokenizer.from_pretrained(self.model)

    def config(self, output_dir: str, **options: Any) -> LNRemovalConfig:
        """The configuration for `LNRemovalTrainer`; options override its fields."""
        from .ln_removal import LNRemovalConfig

        paper: dict[str, Any] = {
            "schedule": self.model,
            "sigma_weight": self.sigma_weight,
            "sigma_momentum": self.sigma_momentum,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": self.min_learning_rate},
            "warmup_steps": self.warmup_steps,
            "max_steps": self.max_steps,
            "save_steps": 100,
            "logging_steps": 1,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
        }
        return LNRemovalConfig(output_dir=output_dir, **{**paper, **options})


RECIPES = {
    "gpt2": Recipe("gpt2", 32, 16, 6e-4, 3e-4, 0.1, 25, 300, 300),
    "gpt2-medium": Recipe("gpt2-medium", 22, 23, 6e-4, 3e-4, 0.1, 10, 500, 500),
    "gpt2-large": Recipe("gpt2-large", 28, 18, 3e-4, 4e-5, 0.03, 15, 1200, 600, 0.9 ** (28 / 32)),
    "gpt2-xl": Recipe("gpt2-xl", 18, 28, 1e-4, 2e-5, 0.01, 20, 1200, 800, 0.9 ** (18 / 32)),
}
"""Size -> settings."""
