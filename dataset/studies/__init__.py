"""Programs that nobody needs to read: studies of stage 3, tables of parts, probes, and the training of encoder and tokenizer."""
