"""Everything that decides what the model sees and how an answer is judged: text, pictures, conversations, batches, tasks."""
