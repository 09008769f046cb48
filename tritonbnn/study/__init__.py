"""AdamBNN's comparisons (2106.11309) as small grids of runs."""
