"""Reading and writing files: tensors larger than memory, and files that appear complete or not at all."""
