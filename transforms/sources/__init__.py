"""Input of every format as shards of records."""
