"""One command each, from files to a folder."""
