"""The devices of a run: its mesh, what lies where on it, and its processes."""
