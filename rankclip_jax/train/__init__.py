"""The training path: session, step, loop, and what stands around them."""
