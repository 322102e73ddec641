"""FleetSpec, local processes, the demo."""
