"""The run folder: its files, its checkpoints, its log and its lock."""
