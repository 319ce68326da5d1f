"""The trainer, its data, its devices and its command line."""
