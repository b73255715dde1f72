"""Where the tasks of a stream come from."""
