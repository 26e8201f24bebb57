"""What sandboxes may share: supervised programs of the daemon, and what lets each sandbox see its part of them."""
