"""`python cli.py ...` from a checkout; the installed command `autorev` is the same group."""

from autorev.cli import main

if __name__ == "__main__":
    main()
