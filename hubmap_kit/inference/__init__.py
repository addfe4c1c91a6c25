"""From a test table to submission.csv: scale, windows, views, folds, thresholds."""
