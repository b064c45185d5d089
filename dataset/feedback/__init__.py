"""Preference data from a model's own answers, as in RLAIF-V (arXiv 2405.17220): pipeline, claims, labels, pairs, best of N."""
