"""Measures a real engine's steps over a designed grid of batches, fits a model of them, and says how far it is off."""
