"""Starts ranks, here or as part of torchrun and Slurm jobs, and runs a job on them."""
