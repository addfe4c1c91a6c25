"""From a tile store to trained folds: dataset, losses, loop, checkpoints, out-of-fold results."""
