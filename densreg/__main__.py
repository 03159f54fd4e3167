"""``python -m densreg``, the command line; also what torchrun starts."""

from densreg.lab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
