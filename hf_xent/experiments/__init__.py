"""Floor 4: experiments that are measured and compared: fine-tuning runs, scores of texts, studies over seeds, plots."""
