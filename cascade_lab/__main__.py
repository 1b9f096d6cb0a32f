"""Runs the command line: `python -m cascade_lab` is `cascade-lab`."""

from cascade_lab.cli import main

if __name__ == "__main__":
    main()
