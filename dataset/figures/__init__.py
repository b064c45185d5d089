"""Figures drawn from the reader's own run; draw.py lists them. `python -m dataset.figures out`."""
