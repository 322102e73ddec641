"""Update-selective merge (DLER, arXiv 2510.15110, section 4.4): theta = base + scale * TopK_|.|(tuned - base).

`plan` checks both checkpoints and lays out the result; `deltas` reads them as float32, a piece at a time; `topk`
finds the K largest updates exactly, by counting; `run` is the whole. Reading, writing and resuming are those of
`vllm_suite.checkpoints`. numpy only: no torch.
"""
