"""Everything that decides what the model reads and how its answers are scored: text, pictures, conversations, batches, tasks."""
