"""The operations at the bottom of the model, one file each. Installed as `twostage.kernels`.

Each states its formula and its gradient, and a reference that leaves the gradient to autograd
stands beside what is written out. Imports torch alone.
"""
