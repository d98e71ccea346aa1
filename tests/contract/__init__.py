"""The contract's documents, and the running service against them."""
