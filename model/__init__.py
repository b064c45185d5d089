"""Everything that is a function of tensors: the language model, the encoder, the connector, losses and generation."""
