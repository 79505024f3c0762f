"""Every decoder of transformers, compiled and compared with the eager model: `python -m tests.sweep`."""
