"""Reading, writing and verifying control groups."""
