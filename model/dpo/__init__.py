"""Stage 3 on preference pairs: the losses by name, the reference's log-probabilities, iterations."""
