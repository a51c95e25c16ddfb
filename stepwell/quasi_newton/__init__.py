"""Parts of quasi-Newton methods: the loss along a line, searches on it, and what they learn."""
