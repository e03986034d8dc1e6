"""Scaling science: counting parameters, FLOPs and memory."""
