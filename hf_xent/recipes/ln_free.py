"""Fine-tune a causal LM until no LayerNorm or RMSNorm is left.

Data: texts, or 'messages', or 'prompt' and 'completion'.
Example: hf-xent ln-free train --model_name_or_path openai-community/gpt2 --dataset_name my_texts/ --max_steps 300
"""

from .text import TextRecipe


class LNFree(TextRecipe):
    """`LNRemovalTrainer` from the command line."""

    trainer, config = "LNRemovalTrainer", "ln_removal:LNRemovalConfig"
