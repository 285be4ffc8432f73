"""Data sets that need a plan: annotations with images beside them, plain image files."""
