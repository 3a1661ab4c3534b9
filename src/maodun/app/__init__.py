"""The doors: the command line (and later the service and the studio)."""
