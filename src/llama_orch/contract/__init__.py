"""The contract as code. Everything here is generated from openapi/ by codegen/generate.py."""
