"""How much each press changes what a real model says next: `kvpass quality`."""
