"""The operating system: files that are whole or absent, folders, signals, and text that is safe to print."""
