"""One builder: a model config -> a network, weights from local files only."""
