"""What each command takes: a dataclass beside its flags."""
