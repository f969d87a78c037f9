"""Keys and values of one sequence: one policy a file."""
