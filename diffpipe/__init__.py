"""diffpipe: train diffusion models that do not fit one GPU, on plain PyTorch."""

from time import perf_counter

BEGAN = perf_counter()  # before all that takes long to import

__version__ = "0.1.0"
