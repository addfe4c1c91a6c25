"""Rehearsal: the rendered kernel script, run unchanged on your own machine the way Kaggle runs it on the hidden test
set.
"""
