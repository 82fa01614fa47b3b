"""Floor 4: runs that are measured and compared: fine-tuning arms, scores of texts, studies over seeds; and pictures."""
