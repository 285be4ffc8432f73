"""Text files: encodings, tables, JSON, spellings of file names."""
