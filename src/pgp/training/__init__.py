"""What `pgp.train` runs on: the session, the state, and what happens at the edges of a task."""
