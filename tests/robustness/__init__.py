"""Is anything lost? Tiny runs are killed, starved and disturbed, and then compared with runs that were let be."""
