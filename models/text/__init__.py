"""Vectors of text: Word2Vec, BERT."""
