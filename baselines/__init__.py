"""What is compared: one file per attention; the file's name is the name on the command line."""
