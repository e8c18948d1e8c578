"""Scoring: which layers of a trained model do work, and which are wasted."""
