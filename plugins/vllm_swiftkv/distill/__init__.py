"""Distillation of a SwiftKV student from the very model it is cut from.

``config`` is the one schema of YAML file, command line and code; ``sources`` reads conversations and texts, ``store``
keeps them as tokens on disk, ``rows`` packs them into batches; ``loss`` and ``student`` are the arithmetic; ``state``
is checkpoints and ``train`` the loop.
"""
