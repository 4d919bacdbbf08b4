"""Trained weights on images: top-1 by density, thresholds of the adaptive form, agreement with a teacher.

In: a run directory, a weights file or a timm name.
Out: tables and pictures of scores, thresholds.
Never: trains.
"""
