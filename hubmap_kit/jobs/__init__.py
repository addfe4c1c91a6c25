"""What a verb or a kernel runs: one file a job, which reads like its own summary."""
