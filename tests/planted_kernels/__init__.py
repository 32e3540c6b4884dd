"""Kernels that a GPU could not run well, and one that it could: what the gate on compiled kernels must tell apart."""
