"""What the suite asks of a Kubernetes API server: a few calls, with the rights of one table."""
