"""What runs the graphs: the cache, the guard, the model."""
