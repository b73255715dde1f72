"""What is said of a stream."""
