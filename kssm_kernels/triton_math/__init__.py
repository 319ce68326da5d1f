"""Device functions in Triton that ops share, and their launch. Nothing imports this before a kernel is asked for."""
