"""Meshes, partition rules and cost models, usable without ``llmir_jax``.

The package is empty so far: programs run on one device.
"""
