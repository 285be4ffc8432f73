"""Beam transforms and the pure functions they wire: chunks in, chunks out."""
