"""The method: objective, weighting, surgery, the sharded engine and the training loop (arXiv 2603.10445)."""
