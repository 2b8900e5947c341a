"""The operations at the bottom of the model, one file each. Installed as `twostage.kernels`.

A fused form stands beside its plain-PyTorch reference; attention and dropout have only the plain
form so far. Imports torch alone.
"""
