"""One method per row of the protocol's table: request struct in, use case, reply struct out; a module per family.

Wire and domain meet here only.
"""
