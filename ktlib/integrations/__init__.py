"""The seams into transformers and PEFT, one file for each."""
