"""Fine-tune under EMO, the earth mover's distance.

Data: texts, or 'messages', or 'prompt' and 'completion'.
Example: hf-xent emo --model_name_or_path smollm2 --dataset_name my_texts/ --variant emo1 --max_steps 100
"""

from .text import TextRecipe


class EMO(TextRecipe):
    """`EMOTrainer` from the command line."""

    trainer, config = "EMOTrainer", "emo:EMOConfig"
