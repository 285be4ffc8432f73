"""Jobs: one module a job, each builds one Beam graph."""
