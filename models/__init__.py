"""Models and their training loops. Nothing here knows Apache Beam."""
