"""kill -9 of the whole service at random moments."""
