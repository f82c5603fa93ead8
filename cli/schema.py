"""`diffpipe schema`."""

from __future__ import annotations


def schema_command(reference: bool) -> None:
    from diffpipe.config.reference import json_schema, reference_yaml

    print(reference_yaml() if reference else json_schema(), end="")
