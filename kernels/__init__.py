"""Triton kernels, one module for each plan operation, installed as `memnet_fast.kernels`.

Only the package marker is here so far: no Triton kernel has been written yet, and no backend claims one.
"""
