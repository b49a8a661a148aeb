"""Evidence: what a hotfix removed, what it left alone, and whether that is enough."""
