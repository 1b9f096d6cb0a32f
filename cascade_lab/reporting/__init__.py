"""Executes a notebook on a run and writes what it shows as one HTML file, which can be rebuilt and compared."""
