"""Kernels for TPU and GPU, usable without ``llmir_jax``.

`chips` says what the chips can do, `tiles` what fits them; each operation is a folder.
"""
