"""Files larger than memory, and files that appear whole or not at all."""
