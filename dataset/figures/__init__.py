"""Figures drawn from the reader's own run: `python -m dataset.figures out`. draw.py lists them."""
