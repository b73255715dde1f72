"""What can be drawn: one module a domain, each with a table `CONCEPTS` from class name to drawing function."""
