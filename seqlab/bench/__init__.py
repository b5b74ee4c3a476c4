"""`seqlab bench`: how fast things are, each beside something else in the same run."""
