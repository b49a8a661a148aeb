"""The entry points that run without the `expunge` command: on Ray, in a Kubernetes pod, and the demo."""
