"""`python -m hhbench`."""

from hhbench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
