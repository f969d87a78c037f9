"""Files and text that are read without trust and written whole: atomic writes, JSON and YAML, typed records, names of clients."""
