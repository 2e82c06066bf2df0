"""A checkpoint that is never whole in memory: read, pruned and written block by block."""
