"""Planning, and the Ray driver that walks a batch through the stages and resumes it."""
