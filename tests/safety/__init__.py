"""Files, servers and configurations from other people, and slips of the keyboard: no code runs, no file is lost, no label changes."""
