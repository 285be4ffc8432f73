"""Encoded images to pixels: one decoder a format, colours, sizes."""
