"""Measurements on a GPU; benchmarks/gpu_window.sh runs all of them."""
