"""Expunge: remove specific outputs from trained diffusion models, in nightly batches, with evidence."""
