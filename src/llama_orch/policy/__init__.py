"""What the service may call (HP-SEC-4): pure judgement of URLs and addresses. No socket, no name server, no log."""
