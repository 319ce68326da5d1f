"""Of the optimizer's step."""
