"""sandbox-init: the PID 1 of every sandbox, its wire format and the channel to it."""
