"""Fused operations, one file each, the plain-PyTorch reference beside the fused form.

Installed as `twostage.kernels`. Imports torch alone.
"""
