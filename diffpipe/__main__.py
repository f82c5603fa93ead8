"""`python -m diffpipe`, also from a bare checkout."""

from pathlib import Path

import diffpipe

# In a checkout the command line lies beside the package; installed, it is inside.
root = Path(__file__).resolve().parent.parent
if (root / "cli" / "__init__.py").is_file() and not (root / "diffpipe" / "cli").exists():
    diffpipe.__path__.append(str(root))

from diffpipe.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
