"""Layers of a decoder, each holding this rank's share of its weights; they know no model and no checkpoint file."""
