"""What stage 3 minimises over preference pairs: the losses by name, the reference's log-probabilities, iterations."""
