"""Loops in C for what stands between matrix products on a CPU, in decode steps and in training."""
