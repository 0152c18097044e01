"""Semantic segmentation, behind `python -m ctxenc segment`."""
