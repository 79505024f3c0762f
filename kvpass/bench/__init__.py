"""`kvpass bench`: how fast and how large, beside transformers and kvpress, in one run."""
