"""What connects a sandbox to anything but itself: sockets that its init hands out, and the daemon's proxies."""
