"""Bytes of shard files: archives, compression, links in them."""
