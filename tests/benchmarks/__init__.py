"""The benchmarks, as far as they can be tried without what they measure."""
