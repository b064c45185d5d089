"""Files that others publish: rows of conversations, benchmarks, tokenizers, chat templates, and rows with pass rates."""
