"""The state machine of the service: events and time in, effects out. No IO, no clock, no randomness, no log."""
