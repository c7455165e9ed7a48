"""Models by name or path, and the heads that sit on them."""
