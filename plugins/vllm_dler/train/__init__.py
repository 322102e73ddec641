"""DLER: reinforcement learning that shortens a reasoning model's answers (arXiv 2510.15110).

``recipe`` is the arithmetic, in torch alone; ``grading`` judges answers; ``rows`` reads the data and ``rollouts``
samples answers until enough groups teach something; ``config`` is the one schema of YAML file, command line and code;
``trainer`` joins all of it to TRL's GRPOTrainer, ``checkpoints`` keeps what a run goes on from, ``run`` is a whole run.
``clusters`` writes the same recipe as settings of verl and OpenRLHF.
"""
