"""Who asked the daemon for what, and what came of it: lines that cannot be changed unnoticed. See docs/AUDIT.md."""
