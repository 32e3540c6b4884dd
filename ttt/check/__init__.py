"""What is said about a run before it starts."""
