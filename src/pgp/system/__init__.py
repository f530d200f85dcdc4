"""Functions around the operating system: atomic files, folders, signals, and text that is safe to print."""
