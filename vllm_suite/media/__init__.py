"""Encoders of multimodal models by their configs alone: parameters, tokens of an item, work. Plain Python.

Shared by the EPD plugin, which says how many images fit on a GPU, and the planner, which says how long they take.
"""
