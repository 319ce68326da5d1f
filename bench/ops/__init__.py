"""Of the ops and the banks."""
