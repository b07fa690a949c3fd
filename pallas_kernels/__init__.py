"""Pallas kernels for TPU and GPU, usable without ``llmir_jax``.

The package is empty so far: every op runs through its reference decomposition.
"""
