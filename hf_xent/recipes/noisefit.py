"""Fine-tune to agree with oneself under noise (NoiseFiT).

Data: texts, or 'messages', or 'prompt' and 'completion'.
Example: hf-xent noisefit --dataset_name chats.jsonl --noise_std 0.1 --use_peft --max_steps 100
"""

from .text import TextRecipe


class NoiseFiT(TextRecipe):
    """`NoiseFiTTrainer` from the command line."""

    trainer, config = "NoiseFiTTrainer", "noisefit:NoiseFiTConfig"
