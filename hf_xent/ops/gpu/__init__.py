"""Kernels in Triton and what launches them. Needs triton; nothing here is imported where a CPU does the work."""
