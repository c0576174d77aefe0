"""`gouache` and `python -m gouache`: the console script.

It imports nothing of the package before it can report in one line that something is missing, or was interrupted.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    try:
        from gouache.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gouache"):
            raise
        again = "install gouache again (with launch.py: delete .venv and run it again)"
        print(f"error: the package {error.name} is missing; {again}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # during the imports
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
