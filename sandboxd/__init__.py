"""A local sandbox manager: isolated sandboxes for projects, with limits that are proven to hold."""

__version__ = "0.1.0"
