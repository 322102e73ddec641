"""The role state machine and its controller. Not landed yet."""
