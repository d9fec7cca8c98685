"""Files that are read and written safely: YAML and whole files. Knows no model and no torch."""
