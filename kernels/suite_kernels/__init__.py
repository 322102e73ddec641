"""Triton kernels, each beside its torch reference. Importing this package imports neither torch nor triton.

``late_kv``: the K and V of all late layers of a SwiftKV model into their paged caches, in one launch.
"""
