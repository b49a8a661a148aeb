"""Everything on disk about nights and jobs. Imports neither Ray nor torch: a driver and a command must start fast."""
