"""The rows of hack/bench, a module per family, and what they stand on."""
