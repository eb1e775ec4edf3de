"""Tangent kernels of networks: what they are, how to compute them, and what they predict."""
