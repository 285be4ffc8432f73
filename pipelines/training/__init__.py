"""What `diptych train` reads, writes and shows."""
