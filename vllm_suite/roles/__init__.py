"""Roles that change while a fleet runs: the state machine, the door and the switch of an instance, the controller."""
