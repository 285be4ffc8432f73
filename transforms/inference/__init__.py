"""Models over chunks: micro-batches, failures, and the rows that each job writes."""
