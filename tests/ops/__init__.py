"""Of the ops: what they compute, which errors they raise, how they behave under torch's machinery, banks included."""
