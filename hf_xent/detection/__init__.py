"""Scores of texts from the statistics of their tokens, and metrics of scores."""
