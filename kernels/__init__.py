"""Triton kernels, one module for each plan operation, installed as `memnet_fast.kernels`; README.md is their design note.

Importing this package, or `tile_config`, needs no Triton; the other modules do.
"""
