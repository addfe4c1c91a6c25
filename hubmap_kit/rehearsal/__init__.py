"""Rehearsal: the rendered kernel script, unchanged, on your own machine as Kaggle runs it on the hidden test set."""
