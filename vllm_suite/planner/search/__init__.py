"""The plans that are possible on a cluster, and the search for the best of them."""
