"""Kernels in Triton and what launches them. They need triton, and are imported only where they are used."""
