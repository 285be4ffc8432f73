"""Formats whose files are shards: WebDataset, TFRecord, Parquet, prompts."""
