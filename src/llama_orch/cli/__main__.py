"""`python -m llama_orch.cli`."""

from llama_orch.cli.main import main

main()
