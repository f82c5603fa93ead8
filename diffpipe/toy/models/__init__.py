"""One tiny random checkpoint a family, each written by ``make(folder)`` in the diffusers folder format."""
