"""Programs outside the reading path: studies of stage 3, tables of parts, probes, and training of the encoder and tokenizer."""
