"""The transformer family: layers, positions, attention, mixture of experts, caches; and baselines."""
