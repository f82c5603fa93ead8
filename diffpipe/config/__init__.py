"""The config: its schema, and how a file and `--set` overrides become one."""
