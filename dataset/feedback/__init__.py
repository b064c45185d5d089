"""Preference data from a model's own answers, as RLAIF-V makes them: pipeline, claims, labels, pairs, and best of N."""
