"""Experiments that run: arms trained in pairs, kept on disk, judged, resumed."""
