"""Slides -> tiles: the grid, the scale, and the store that random crops and grid tiles are read from."""
