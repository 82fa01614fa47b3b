"""Train on preferences and on the degree of missing key phrases (SPO).

Data: 'prompt', 'chosen' and 'rejected'; texts or conversations.
Example: hf-xent spo --model_name_or_path smollm2 --dataset_name pairs.jsonl --gamma_w 0.2 --use_peft --max_steps 100
"""

from .preferences import PreferenceRecipe


class SPO(PreferenceRecipe):
    """`SPOTrainer` from the command line."""

    trainer, config = "SPOTrainer", "spo:SPOConfig"
