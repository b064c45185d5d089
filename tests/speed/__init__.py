"""How fast training is, beside other ways to compute the same and beside the code of others: `python -m tests.speed`."""
