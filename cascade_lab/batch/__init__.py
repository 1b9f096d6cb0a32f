"""Scoring of large data sets: shards, two engines (this machine, a Ray cluster), and a job that can be resumed."""
