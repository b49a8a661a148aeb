"""Plans a batch, and runs or resumes it on Ray, stage by stage."""
