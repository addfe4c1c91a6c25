"""What Kaggle gives and takes: organs, tables, slides, run-length strings, folds, metric, submission."""
