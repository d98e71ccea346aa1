"""The command line: a client of the service that knows its contract and nothing of its inside."""
