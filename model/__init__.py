"""Everything that computes on tensors: language model, encoder, connector, losses, generation, and what runs them on devices."""
