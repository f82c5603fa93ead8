"""diffpipe: train diffusion models that do not fit one GPU, on plain PyTorch."""

__version__ = "0.1.0"
