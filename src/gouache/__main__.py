"""`python -m gouache`: the same as the command `gouache`."""

from __future__ import annotations

from gouache.cli.main import main

if __name__ == "__main__":
    main()
