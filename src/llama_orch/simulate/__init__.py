"""What would my cards make of this load? The real core and runtime on imaginary cards and models, in virtual time."""
