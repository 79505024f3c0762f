"""What kvpass finds in a model: the attentions, their masks and rotations, and which presses can run."""
