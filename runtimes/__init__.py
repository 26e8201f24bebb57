"""Everything that knows the words of a container engine or of the kernel.

Nothing in this package imports ``sandboxd``: an engine can be driven, a limit verified and
``sandbox-init`` spoken to without a daemon.
"""
