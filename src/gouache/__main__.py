"""`python -m gouache`: the same as the command `gouache`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from gouache.cli.main import main

        main()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gouache"):
            raise
        again = "install gouache again (with launch.py: delete .venv and run it again)"
        print(f"error: the package {error.name} is missing; {again}", file=sys.stderr)
        sys.exit(2)
