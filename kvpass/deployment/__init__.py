"""Compiled models as files that run without kvpass: what an export holds, and how it is written and read."""
