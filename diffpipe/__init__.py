"""diffpipe: train diffusion models that do not fit one GPU, on plain PyTorch."""

import os
from time import perf_counter

# Before all that takes long to import.
BEGAN = perf_counter()
STARTED_BY = os.getppid()

__version__ = "0.1.0"
