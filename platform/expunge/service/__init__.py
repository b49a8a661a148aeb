"""HTTP intake: the paths of the command line over HTTP, for tenants that cannot see one another."""
