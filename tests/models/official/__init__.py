"""A plain training step of each family, from its official formula over diffusers' own classes, and the names ComfyUI reads.

One module a family, with ``-`` as ``_``:

- ``loss(module, folder, batch, noise, t)``: the loss of one step. ``module`` is the denoiser, ``folder`` its diffusers
  pipeline, ``batch`` the cached tensors (first dim B), ``noise`` and ``t`` what was drawn (t in [0, 1], 1 is pure noise).
  Nothing of diffpipe's own code.
- ``COMFYUI``: what ComfyUI calls the layers that a default LoRA adapts in the first block of each kind; ``FIRST``, a pattern of
  the names that belong to those, where they are not just the ones whose first number is 0.
"""
