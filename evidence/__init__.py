"""The tables and pictures of results/, made from the records of runs."""
