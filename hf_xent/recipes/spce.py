"""Train on preferences with a strength each (SPCE).

Data: 'prompt', 'chosen', 'rejected', and if you have them 'preference_prob' and 'weight'; texts or conversations.
Example: hf-xent spce --model_name_or_path smollm2 --dataset_name pairs.jsonl --beta 0.1 --use_peft --max_steps 100
"""

from .preferences import PreferenceRecipe


class SPCE(PreferenceRecipe):
    """`SPCETrainer` from the command line."""

    trainer, config = "SPCETrainer", "spce:SPCEConfig"
