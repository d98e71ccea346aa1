"""What the service says of itself: metrics and logs. Reads events and snapshots, decides nothing."""
