"""Simulator and plan search. Not landed yet."""
