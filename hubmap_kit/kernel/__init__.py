"""Inside a Kaggle kernel: what is mounted, the accelerator, and the jobs of the three kernels."""
