"""Kernels in Triton and the functions that launch them. They need triton, and are imported only where they are used."""
