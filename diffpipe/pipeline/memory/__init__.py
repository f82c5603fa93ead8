"""The memory layer: what a stage keeps, recomputes or moves; it acts on units from outside."""
