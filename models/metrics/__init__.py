"""Scores of captions and of images."""
