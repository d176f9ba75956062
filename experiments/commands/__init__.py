"""The verbs of the command line, one subject a module; heavy imports wait until one runs."""
