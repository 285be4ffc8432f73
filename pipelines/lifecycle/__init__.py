"""A job from start to end: its output folder, its models, its summary."""
