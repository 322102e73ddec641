"""DistServe: its simulator's own rules, its formulas, and its two placement algorithms as published."""
