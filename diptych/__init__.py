"""Batch pipelines for image-caption data sets on Apache Beam: every row accounted for."""
