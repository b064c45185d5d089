"""Files that other projects publish: conversations, benchmarks, tokenizers, chat templates, and rows with pass rates."""
