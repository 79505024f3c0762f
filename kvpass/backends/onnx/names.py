"""What models are written and read with."""

STATE = "_out"  # ends the name of an output that is the new value of an input
IN_PLACE = "kvpass.in_place"  # metadata of a model: inputs that may lie where their new values are written
WEIGHTS = "weights.bin"
