"""How well a model does: accuracy, metrics over accuracy matrices, and online accuracy."""
