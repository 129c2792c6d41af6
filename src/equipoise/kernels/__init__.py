"""Loops in C for what a decode step does between its matrix products on a CPU."""
