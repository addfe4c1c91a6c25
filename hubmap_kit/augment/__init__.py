"""Augmentation of image and mask together."""
