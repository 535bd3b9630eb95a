"""Supervised fine-tuning: parameters, data, training, evaluation, saving."""
