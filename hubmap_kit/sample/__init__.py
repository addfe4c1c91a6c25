"""The embedded synthetic slides, in the competition's own folder format."""
