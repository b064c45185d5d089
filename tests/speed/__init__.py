"""How fast training is, beside other ways to compute the same and beside the code of others: `python -m tests.speed`."""

import model  # noqa: F401  before torch, as the scripts do: it sets what torch's libraries read when they are loaded
