"""Checkpoints in, checkpoints out: what every tool that makes one checkpoint of others shares.

`source` reads a Hugging Face checkpoint by byte ranges; `shards` describes the weight files of a result; `output`
writes them so that an interrupted run goes on and half a result is never a result; `progress` shows it. Plain Python:
neither torch nor numpy is imported.
"""
