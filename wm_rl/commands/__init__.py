"""One module per command of main.py."""
