"""The ops as Triton kernels: kernels, their tiles and launches."""
