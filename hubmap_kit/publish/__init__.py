"""On your own machine: bundle, push, kernels, quota, submission, rehearsal. Nothing here is needed inside a kernel."""
