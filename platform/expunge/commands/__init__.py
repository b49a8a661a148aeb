"""The commands, one module per group. Heavy imports stay inside functions, so that `expunge --help` answers at once."""
