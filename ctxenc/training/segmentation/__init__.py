"""Semantic segmentation: what `python -m ctxenc segment` runs."""
