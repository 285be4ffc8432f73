"""Where a job runs: in this process, on Flink, on Dataflow."""
