"""Captions from images: a CNN with an RNN, and captioners of Hugging Face."""
