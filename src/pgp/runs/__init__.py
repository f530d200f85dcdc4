"""The folder of a run: its files, checkpoints, log and lock."""
