"""`kvpass demo`: a real model reads a long real text, with and without compression."""
