"""What changed and why: drift of old tasks, and audits of a finished run."""
