"""The commands, one module a group. Nothing heavy is imported above a function: `expunge --help` answers at once."""
