"""Decoders, built from the normalised checkpoint config; they know neither files nor processes."""
