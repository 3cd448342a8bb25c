"""Kernels for eager mode, where a formula is one pass over memory: exact and lean, for the CPU and for GPUs."""
