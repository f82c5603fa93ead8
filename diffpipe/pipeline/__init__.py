"""The parallel layer: ranks on a mesh, a model cut into stages, and a schedule that runs them."""
