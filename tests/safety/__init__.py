"""Files, servers and configurations from other people, and typing errors: no code runs, no file is lost, no label changes."""
